"""``functional.steer`` at the cost of its matrix products, for training.

With ``N`` tokens and ``G = 2 d_in d_sae``, a training step takes ``3 N G`` operations forward (the
adapter, the encoder, the decoder; two without a clamp) and ``2 N G`` backward (the decoder
transposed, the weight's gradient). They are made in tiles of some tokens and some features, and
everything else is done to a tile in place while it is in the processor's cache. For the backward
pass it keeps its input and one byte for each feature of each token, or the input alone.

The formulas are those of ``functional``, which remains the reference: this is the same function
with a backward pass written by hand, in the same words. On a GPU none of it was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import functional
from ._pointwise import advance, retreat
from ._tiles import Total, plus, tiles

if TYPE_CHECKING:
    from jaxtyping import Float


class Dictionary(Protocol):
    """What steering needs of an SAE; ``FrozenSAE`` is one."""

    feature_scale: Tensor | None
    featurewise: bool

    @property
    def n_encoded(self) -> int:
        """How many features its encoder gives at once."""

    @property
    def W_dec(self) -> Tensor:
        """Decoder rows, shape ``(d_sae, d_in)``."""

    def process_in(self, x: Tensor) -> Tensor:
        """``x~``, shape of ``x``."""

    def encode_slice(self, x: Tensor, features: slice) -> Tensor:
        """Some columns of ``f``, each token's from that token alone: shape ``(..., part)``.

        Of an SAE that is not ``featurewise``, all of them are asked for at once.
        """

    def token_scale(self, x: Tensor) -> Tensor | float | None:
        """Factor of what is decoded, shape ``(..., 1)``, a number, or None for 1."""


class Operation(NamedTuple):
    """What ``steer`` is to do.

    Attributes:
        sae: the dictionary in which is steered.
        activation: one of ``functional.ACTIVATIONS``.
        bandwidth: kernel width of ``jumprelu``.
        clamps: ``f' = relu(f + v)`` rather than ``f + v``.
        measures: also return the norms of ``v``.
        recomputes: keep nothing as wide as the SAE for the backward pass.
    """

    sae: Dictionary
    activation: str
    bandwidth: float
    clamps: bool
    measures: bool
    recomputes: bool

    @property
    def encodes(self) -> bool:
        """Whether ``f`` is needed: the other activations promote only."""
        return self.clamps and self.activation == "soft_threshold"


class Steering(NamedTuple):
    """What ``steer`` returns.

    Attributes:
        output: the steered ``x'``, shape ``(..., d_in)``, dtype of ``x``.
        l1: ``||v||_1`` of each token, shape ``(...)``, float32 or wider; differentiable.
        l0: number of features with ``v != 0``, shape ``(...)``; nan counts as none.
        l2: ``||v||_2``, shape ``(...)``.
        open_gates: number of open gates of ``jumprelu``, shape ``(...)``; differentiable. None for
            the other activations. This and the norms are None where nothing is measured.
    """

    output: Float[Tensor, "*batch d_in"]
    l1: Float[Tensor, "*batch"] | None
    l0: Float[Tensor, "*batch"] | None
    l2: Float[Tensor, "*batch"] | None
    open_gates: Float[Tensor, "*batch"] | None


def steer(
    operation: Operation,
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_sae rank"],
    bias: Float[Tensor, "d_sae"],
    down: Float[Tensor, "rank d_in"] | None,
    threshold: Float[Tensor, "d_sae"] | None,
) -> Steering:
    """``functional.steer`` without an edit, by one autograd function.

    Args:
        operation: see there.
        x: the wrapped module's output, shape ``(..., d_in)``.
        weight: see ``functional.steering_pre``, as for ``bias`` and ``down``.
        bias: shape ``(d_sae,)``.
        down: shape ``(rank, d_in)``, or None.
        threshold: see ``functional.steering_vector``.

    Raises:
        RuntimeError: when the gradient is differentiated once more.
    """
    if x.is_inference() and not torch.is_inference_mode_enabled():
        # Such a tensor cannot be kept for a backward pass.
        x = x.clone()
    inputs = (x, weight, bias, down, threshold)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return Steering(*_Steer.apply(operation, *inputs))
    return _forward(operation, *inputs)[0]


def _forward(
    operation: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    down: Tensor | None,
    threshold: Tensor | None,
    keep_code: bool = False,
    keep_delta: bool = False,
) -> tuple[Steering, Tensor | None, Tensor | None]:
    """The result; one byte per feature; what was decoded, where its factor depends on ``x``."""
    sae, tokens, n_features = operation.sae, x.reshape(-1, x.shape[-1]), len(weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    # Neither this nor the norms may leave as views: nobody could change them in place.
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat = output.view(tokens.shape)
    measured = tokens.new_zeros((3, len(tokens)), dtype=wide) if operation.measures else None
    code = tokens.new_empty((len(tokens), n_features), dtype=torch.int8) if keep_code else None
    decoded = None
    for rows, columns in _tiles(operation, tokens, weight):
        some = tokens[rows]
        read = _read(sae.process_in(some), weight, down)
        delta = None
        for features in columns:
            update = advance(
                functional.steering_pre(read, weight[features], bias[features]),
                sae.encode_slice(some, features) if operation.encodes else None,
                None if threshold is None else threshold[features],
                operation.activation,
                operation.bandwidth,
                None if code is None else code[rows, features],
                None if measured is None else measured[:, rows],
            )
            delta = plus(delta, _decode(sae, update, features))
        assert delta is not None
        scale = sae.token_scale(some)
        if keep_delta and isinstance(scale, Tensor):
            decoded = torch.empty_like(tokens, dtype=delta.dtype) if decoded is None else decoded
            decoded[rows] = delta
        delta = delta if scale is None else delta * scale
        torch.add(some, delta.to(some.dtype), out=flat[rows])
    code = None if code is None else code.reshape(*x.shape[:-1], n_features)
    if measured is None:
        return Steering(output, None, None, None, None), code, decoded
    measured[2].sqrt_()
    l1, l0, l2 = (row.reshape(x.shape[:-1]).clone() for row in measured)
    gates = l0.clone() if operation.activation == "jumprelu" else None
    return Steering(output, l1, l0, l2, gates), code, decoded


class _Steer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Operation, *inputs: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, down, threshold = inputs
        keeps = not operation.recomputes, ctx.needs_input_grad[1]
        steering, code, decoded = _forward(operation, x, weight, bias, down, threshold, *keeps)
        ctx.operation = operation
        ctx.save_for_backward(*inputs, code, decoded)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in (steering.l0, steering.l2) if t is not None))
        device = x.device.type
        ctx.autocast = nullcontext
        if torch.amp.is_autocast_available(device):
            dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            ctx.autocast = partial(torch.autocast, device, dtype=dtype, enabled=enabled)
        return tuple(steering)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with ctx.autocast():
            return _backward(ctx, *gradients)


def _backward(
    ctx: Any, g_output: Tensor | None, g_l1: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, bias, down, threshold, code, decoded = ctx.saved_tensors
    operation: Operation = ctx.operation
    sae = operation.sae
    _, needs_x, *needs = ctx.needs_input_grad
    tokens = x.reshape(-1, x.shape[-1])
    code = None if code is None else code.reshape(-1, len(weight))
    g_output = None if g_output is None else g_output.reshape(tokens.shape)
    g_l1, g_gates = (None if g is None else g.reshape(-1, 1) for g in (g_l1, others[-1]))
    g_x = None if g_output is None else g_output.clone() if needs_x else None
    if needs_x and g_x is None:
        g_x = torch.zeros_like(tokens)
    totals = [Total(p, n) for p, n in zip((weight, bias, down, threshold), needs, strict=True)]
    g_weight, g_bias, g_down, g_threshold = totals
    for rows, columns in _tiles(operation, tokens, weight):
        with torch.set_grad_enabled(needs_x):
            some = tokens[rows].detach().requires_grad_(needs_x)
            sae_input, scale = sae.process_in(some), sae.token_scale(some)
        read = _read(sae_input.detach(), weight, down)
        g_delta = _delta_gradient(sae, None if g_output is None else g_output[rows], scale)
        g_read = g_some = None
        for features in columns:
            f = None
            if operation.encodes and (needs_x or code is None):
                with torch.set_grad_enabled(needs_x):
                    f = sae.encode_slice(some, features)
            shrinks = None if threshold is None else threshold[features]
            how = (shrinks, operation.activation, operation.bandwidth)
            if code is None:
                u = functional.steering_pre(read, weight[features], bias[features])
                some_code = torch.empty_like(u, dtype=torch.int8)
                advance(u, None if f is None else f.detach(), *how, some_code, None)
            else:
                some_code = code[rows, features]
            g_f = torch.empty_like(f) if needs_x and f is not None else None
            g_u, part = retreat(
                _update_gradient(sae, g_delta, features, some_code),
                None if g_l1 is None else g_l1[rows],
                None if g_gates is None else g_gates[rows],
                *how,
                some_code,
                g_f,
            )
            g_threshold.add(features, part)
            g_bias.add(features, g_u.sum(dim=0))
            g_u = g_u.to(weight.dtype)
            g_weight.add_product(features, g_u, read)
            if needs_x or g_down.is_needed:
                g_read = plus(g_read, g_u @ weight[features])
            if g_x is not None and f is not None:
                g_some = plus(g_some, _pull_back(some, [(f, g_f)]))
        g_read = None if g_read is None else g_read.to(weight.dtype)
        if down is not None and g_read is not None:
            g_down.add_product(slice(None), g_read, sae_input.detach().to(weight.dtype))
            g_read = g_read @ down
        if g_x is not None:
            paths: list[tuple[Any, Any]] = [(sae_input, g_read)]
            if decoded is not None and g_output is not None:
                g_scale = (g_output[rows] * decoded[rows]).sum(dim=-1, keepdim=True)
                paths.append((scale, g_scale))
            g_x[rows] += plus(g_some, _pull_back(some, paths))
    g_x = None if g_x is None else g_x.reshape(x.shape)
    return (None, g_x, *(total.value for total in totals))


def _read(sae_input: Tensor, weight: Tensor, down: Tensor | None) -> Tensor:
    """What the weight is applied to: the SAE's input, or its image under ``down``."""
    read = sae_input.to(weight.dtype)
    return read if down is None else F.linear(read, down)


def _decode(sae: Dictionary, update: Tensor, features: slice) -> Tensor:
    scale = None if sae.feature_scale is None else sae.feature_scale[features]
    return functional.decode_update(update.to(sae.W_dec.dtype), sae.W_dec[features], scale)


def _delta_gradient(
    sae: Dictionary, g_output: Tensor | None, scale: Tensor | float | None
) -> Tensor | None:
    if g_output is None:
        return None
    g_delta = g_output.to(sae.W_dec.dtype)
    if scale is None:
        return g_delta
    return g_delta * (scale.detach() if isinstance(scale, Tensor) else scale)


def _update_gradient(
    sae: Dictionary, g_delta: Tensor | None, features: slice, like: Tensor
) -> Tensor:
    """The transpose of ``_decode``; zeros, where the output was not used."""
    if g_delta is None:
        return torch.zeros(like.shape, dtype=sae.W_dec.dtype, device=like.device)
    g_update = g_delta @ sae.W_dec[features].T
    return g_update if sae.feature_scale is None else g_update.mul_(sae.feature_scale[features])


def _pull_back(x: Tensor, paths: list[tuple[Any, Any]]) -> Tensor:
    """The gradient of ``x`` through functions of it that are the SAE's own."""
    through = [(y, g.to(y.dtype)) for y, g in paths if y.requires_grad]
    outputs, gradients = zip(*through, strict=True)
    return torch.autograd.grad(outputs, x, gradients)[0]


def _tiles(
    operation: Operation, tokens: Tensor, weight: Tensor
) -> Iterator[tuple[slice, list[slice]]]:
    needs_all = operation.encodes and not operation.sae.featurewise
    n_encoded = operation.sae.n_encoded if needs_all else None
    return tiles(len(tokens), len(weight), tokens.device, n_encoded)
