"""What ``fused`` does between its matrix products, in place: one feature at one token at a time.

The formulas are those of ``functional``. ``torch.compile`` can make one pass of each function; on a
CPU, signs are taken by arithmetic, because comparisons and selections take several times as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int8


def advance(
    u: Float[Tensor, "tokens features"],
    f: Float[Tensor, "tokens features"] | None,
    threshold: Float[Tensor, "features"] | None,
    activation: str,
    bandwidth: float,
    code: Int8[Tensor, "tokens features"] | None,
    measured: Float[Tensor, "3 tokens"] | None,
) -> Float[Tensor, "tokens features"]:
    """``max(act_theta(u), -f)``.

    Args:
        u: pre-activations, shape ``(tokens, features)``; overwritten.
        f: feature activations of that shape; None where nothing is clamped.
        threshold: see ``functional.steering_vector``.
        activation: one of ``functional.ACTIVATIONS``.
        bandwidth: kernel width of ``jumprelu``.
        code: receives what ``retreat`` needs. For ``jumprelu``, bit 0 says that the gate is open
            and bit 1 that ``u`` lies inside the kernel; for the others it is the sign of ``v``,
            and twice that where ``v`` is clamped.
        measured: gets ``||v||_1``, the count of ``v != 0`` and ``||v||_2 ** 2`` added, shape
            ``(3, tokens)``.
    """
    dtype = _common_dtype(activation, u, f, threshold)
    u, bound = u.to(dtype), _bound(threshold, activation, dtype)
    sign = u
    if activation == "jumprelu":
        assert bound is not None
        distance = u.relu_() - bound
        is_open = distance > 0
        if code is not None:
            is_inside = distance.abs_() < bandwidth / 2
            code.copy_(is_open.to(torch.int8) + 2 * is_inside.to(torch.int8))
        sign = is_open.to(dtype)
        # Nothing is above nan, but a threshold that is nan must not pass for a closed gate.
        torch.addcmul(bound * 0, u, sign, out=u)
    else:
        if bound is None:
            u.relu_()
        else:
            u.sub_(u.clamp(-bound, bound))
        if code is not None or measured is not None:
            sign = u.sign()
        if code is not None:
            code.copy_(sign)
    if measured is not None:
        wide = measured.dtype
        measured[0] += u.abs().sum(dim=-1, dtype=wide)
        measured[1] += sign.abs_().sum(dim=-1, dtype=wide)
        widest = torch.promote_types(u.dtype, wide)
        measured[2] += torch.linalg.vector_norm(u, dim=-1, dtype=widest).square_()
    if f is None:
        return u
    f = f.to(dtype)
    if code is not None:
        is_free = torch.add(u, f).sign_().to(torch.int8).clamp_(min=0)
        code.mul_(2 - is_free)
    return torch.maximum(u, f.neg(), out=u)


def retreat(
    g: Float[Tensor, "tokens features"],
    g_l1: Float[Tensor, "tokens 1"] | None,
    g_gates: Float[Tensor, "tokens 1"] | None,
    threshold: Float[Tensor, "features"] | None,
    activation: str,
    bandwidth: float,
    code: Int8[Tensor, "tokens features"],
    g_f: Float[Tensor, "tokens features"] | None,
) -> tuple[Float[Tensor, "tokens features"], Float[Tensor, "features"] | None]:
    """The gradients of what ``advance`` was given.

    Args:
        g: gradient of what it returned, shape ``(tokens, features)``; overwritten.
        g_l1: gradient of ``||v||_1``, shape ``(tokens, 1)``.
        g_gates: gradient of the count of open gates, shape ``(tokens, 1)``.
        threshold: as there.
        activation: as there.
        bandwidth: as there.
        code: what it left there.
        g_f: receives the gradient of ``f``.

    Returns:
        The gradient of ``u``, and that of ``threshold``.
    """
    dtype = _common_dtype(activation, g, g_l1, threshold)
    g, bound = g.to(dtype), _bound(threshold, activation, dtype)
    passes = (code & 1).to(dtype)
    if activation == "jumprelu":
        assert bound is not None
        if g_l1 is not None:
            g.addcmul_(passes, g_l1)
        jump = g * bound if g_gates is None else torch.addcmul(g_gates, g, bound)
        # The parameter is the threshold's logarithm: once more that factor.
        g_threshold = jump.mul_((code >> 1).to(dtype)).sum(dim=0).mul_(bound).div_(-bandwidth)
        return g.mul_(passes), g_threshold
    if g_f is not None:
        torch.mul(g, (code.abs() >> 1).to(dtype).neg_(), out=g_f)
    g.mul_(passes)
    if g_l1 is None and bound is None:
        return g, None
    sign = code.sign().to(dtype)
    if g_l1 is not None:
        g.addcmul_(sign, g_l1)
    return g, None if bound is None else sign.mul_(g).sum(dim=0).neg_()


def _common_dtype(activation: str, *tensors: Tensor | None) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    if activation == "jumprelu":
        dtypes.append(torch.float32)
    common = dtypes[0]
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return common


def _bound(threshold: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor | None:
    """``theta`` in the range in which it acts, from the parameter that stands for it."""
    if threshold is None:
        return None
    threshold = threshold.detach().to(dtype)
    return threshold.exp() if activation == "jumprelu" else threshold.clamp(min=0)
