"""The mathematics of feature steering: pure tensor functions, no modules, no state.

Notation (arXiv 2509.12934). ``x`` is the output of the wrapped module, shape ``(..., d_in)``; a
sparse autoencoder (SAE) maps it to feature activations ``f``, shape ``(..., d_sae)``, and back.
The adapter reads the SAE's own input ``x~`` and writes a steering vector in feature space::

    u  = x~ @ weight.T + bias              steering_pre
    v  = act_theta(u)                      steering_vector
    f' = relu(f + v)                       steered feature activations
    x' = x + decode(f') - decode(f)        the SAE's reconstruction error is kept untouched

Because ``f >= 0``, ``f' - f = max(v, -f)``: one linear decode is enough, the decoder's bias
cancels, and ``x' == x`` exactly where ``v == 0``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float

ACTIVATIONS = ("soft_threshold", "relu", "jumprelu", "gain")
_PROMOTES_ONLY = ("relu", "jumprelu")


class Norms(NamedTuple):
    """How strongly each token was steered.

    Attributes:
        l0: number of features with ``v != 0``.
        l1: ``||v||_1``, differentiable.
        l2: ``||v||_2``, differentiable.
        open_gates: number of open gates of ``jumprelu``, differentiable; None for the others.
    """

    l0: Float[Tensor, "*batch"]
    l1: Float[Tensor, "*batch"]
    l2: Float[Tensor, "*batch"]
    open_gates: Float[Tensor, "*batch"] | None


class Steered(NamedTuple):
    """What one application of the adapter produced.

    Attributes:
        output: the steered ``x'``, in the dtype of ``x``.
        norms: how strongly each token was steered, if that was asked for.
        steering_vector: ``v`` in feature space as it acted, in the dtype of the adapter, if that
            was asked for.
        gate: the differentiable ``1[u > theta]`` of ``jumprelu`` for an L0 penalty, with ``v``;
            None for the other activations.
    """

    output: Float[Tensor, "*batch d_in"]
    norms: Norms | None
    steering_vector: Float[Tensor, "*batch d_sae"] | None
    gate: Float[Tensor, "*batch d_sae"] | None


def soft_threshold(
    u: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, "#d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """``sign(u) * relu(|u| - threshold)``: two-sided shrinkage.

    A negative threshold would steer a feature at every token, by no less than its size. It acts as
    zero, and keeps the gradient that it has at zero, so that it can come back.

    Args:
        u: pre-activations, shape ``(..., d_sae)``.
        threshold: one value per feature, shape ``(d_sae,)``.

    Returns:
        Shrunk values, shape of ``u``; exactly zero where ``|u| <= threshold``.
    """
    threshold = threshold + torch.relu(-threshold).detach()
    return torch.sign(u) * torch.relu(u.abs() - threshold)


class _StraightThroughStep(torch.autograd.Function):
    """``1[u > theta]`` with a rectangle kernel in place of the missing gradient for ``theta``.

    Source: Rajamanoharan et al., "Jumping Ahead" (arXiv 2407.14435), equation 11.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        return (u > threshold).to(u.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        u, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(u, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        u, threshold = ctx.saved_tensors
        kernel = ((u - threshold).abs() < ctx.bandwidth / 2).to(grad.dtype)
        per_token = -(kernel / ctx.bandwidth) * grad
        return None, per_token.sum_to_size(threshold.shape), None


def straight_through_step(
    u: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, "#d_sae"], bandwidth: float
) -> Float[Tensor, "*batch d_sae"]:
    """``1[u > threshold]`` whose gradient with respect to ``threshold`` is a rectangle kernel.

    Args:
        u: pre-activations, shape ``(..., d_sae)``; receives no gradient.
        threshold: shape ``(d_sae,)``; receives ``-K((u - threshold) / bandwidth) / bandwidth``
            with ``K(z) = 1[|z| < 1/2]``, summed over tokens.
        bandwidth: width of the kernel, in units of ``u``.

    Returns:
        Zeros and ones, shape and dtype of ``u``.
    """
    step: Tensor = _StraightThroughStep.apply(u, threshold, bandwidth)
    return step


def jumprelu(
    u: Float[Tensor, "*batch d_sae"], log_threshold: Float[Tensor, "#d_sae"], bandwidth: float
) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
    """``relu(u) * 1[relu(u) > exp(log_threshold)]``, in float32 or wider.

    The straight-through gradient with respect to the threshold is
    ``-(threshold / bandwidth) * K((relu(u) - threshold) / bandwidth)``: the height of the jump is
    the threshold itself, not the value of ``u`` that happens to lie near it.

    Args:
        u: pre-activations, shape ``(..., d_sae)``.
        log_threshold: logarithm of one positive threshold per feature, shape ``(d_sae,)``.
        bandwidth: width of the kernel, in units of ``u``.

    Returns:
        The activations and the differentiable gate ``1[relu(u) > threshold]``, each of the shape of
        ``u``.
    """
    # A threshold near 1e-3 and a kernel of the same width cannot be resolved in 16 bits.
    wide = torch.promote_types(u.dtype, torch.float32)
    positive = torch.relu(u.to(wide))
    threshold = torch.exp(log_threshold.to(wide))
    gate = straight_through_step(positive, threshold, bandwidth)
    active = gate.detach()
    # Forward: positive * active. The second term is zero forward and carries the gradient
    # threshold * d(gate)/d(threshold), with the jump's height held constant.
    value = positive * active + threshold.detach() * (gate - active)
    return value, gate


def steering_vector(
    u: Float[Tensor, "*batch d_sae"],
    threshold: Float[Tensor, "#d_sae"] | None,
    *,
    activation: str,
    bandwidth: float,
) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"] | None]:
    """Apply the adapter's activation to its pre-activations.

    Args:
        u: pre-activations, shape ``(..., d_sae)``.
        threshold: ``theta`` for ``soft_threshold``, ``log(theta)`` for ``jumprelu``, the signed
            factor of ``gain * relu(u)`` for ``gain``, None for ``relu``; shape ``(d_sae,)``.
        activation: one of ``ACTIVATIONS``.
        bandwidth: kernel width of ``jumprelu``; the others ignore it.

    Returns:
        ``v`` of the shape of ``u``, and the gate of ``jumprelu`` or None.

    Raises:
        ValueError: if ``activation`` is not one of ``ACTIVATIONS``.
    """
    if activation == "relu":
        return torch.relu(u), None
    if activation == "gain":
        assert threshold is not None
        return threshold * torch.relu(u), None
    if activation == "soft_threshold":
        assert threshold is not None
        return soft_threshold(u, threshold), None
    if activation == "jumprelu":
        assert threshold is not None
        return jumprelu(u, threshold, bandwidth)
    raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}.")


def steering_margin(
    u: Float[Tensor, "*batch d_sae"],
    threshold: Float[Tensor, "#d_sae"] | None,
    *,
    activation: str,
) -> Float[Tensor, "*batch d_sae"]:
    """By how much a threshold may rise before its feature is no longer steered; else below 0.

    In the units in which thresholds are stored: ``|u| - theta`` for ``soft_threshold``,
    ``log(u) - log(theta)`` for ``jumprelu``, and ``u`` for ``relu``, whose bias may fall instead.

    Args:
        u: pre-activations, shape ``(..., d_sae)``.
        threshold: see ``steering_vector``.
        activation: one of ``ACTIVATIONS`` but ``gain``, which has no threshold.

    Returns:
        Shape of ``u``; ``-inf`` where no threshold of ``jumprelu`` is low enough.
    """
    if activation == "relu":
        return u
    assert threshold is not None
    if activation == "jumprelu":
        return torch.relu(u).log() - threshold
    assert activation == "soft_threshold", activation
    return u.abs() - torch.relu(threshold)


def clamped_update(
    v: Float[Tensor, "*batch d_sae"], feature_acts: Float[Tensor, "*batch d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """``relu(f + v) - f = max(v, -f)`` for ``f >= 0``: the change of the feature activations.

    The gradient with respect to ``v`` is 1 where ``v > -f`` and 0 elsewhere, ties included, which
    is what differentiating ``relu(f + v) - f`` gives (``torch.maximum`` would halve it at ties).

    Args:
        v: steering vector, shape ``(..., d_sae)``.
        feature_acts: ``f``, non-negative, shape ``(..., d_sae)``.

    Returns:
        ``f' - f``, shape ``(..., d_sae)``.
    """
    # This way round nan in v stays nan, as in the formula, and does not pass for a suppression.
    return torch.where(v <= -feature_acts, -feature_acts, v)


def normalization_scale(
    x: Float[Tensor, "*batch d_in"], normalize_activations: str
) -> Float[Tensor, "*batch 1"] | None:
    """Per-token factor by which an SAE's output side undoes its run-time input normalization.

    Under ``layer_norm`` the decoder's output is multiplied by the token's standard deviation, under
    ``constant_norm_rescale`` by its norm over ``sqrt(d_in)``. Means and biases cancel in a
    difference of two decodes. The other normalizations are folded into the weights.

    Args:
        x: the SAE's raw input, shape ``(..., d_in)``.
        normalize_activations: SAELens's name of the normalization.

    Returns:
        Shape ``(..., 1)``, or None where the factor is one.
    """
    if normalize_activations == "layer_norm":
        return x.std(dim=-1, keepdim=True)
    if normalize_activations == "constant_norm_rescale":
        scale: Tensor = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return scale
    return None


def decode_update(
    update: Float[Tensor, "*batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    feature_scale: Float[Tensor, "d_sae"] | None = None,
    token_scale: Float[Tensor, "*batch 1"] | float | None = None,
) -> Float[Tensor, "*batch d_in"]:
    """The linear part of an SAE's decoder, applied to a change of its feature activations.

    Args:
        update: ``f' - f``, shape ``(..., d_sae)``.
        W_dec: decoder weight, shape ``(d_sae, d_in)``.
        feature_scale: factor per feature, shape ``(d_sae,)`` (SAEs that treat the decoder's rows as
            normalized).
        token_scale: factor per token, shape ``(..., 1)``; see ``normalization_scale``. Or a number.

    Returns:
        ``decode(f + update) - decode(f)``, shape ``(..., d_in)``.
    """
    if feature_scale is not None:
        update = update * feature_scale
    delta = update @ W_dec
    return delta if token_scale is None else delta * token_scale


def steering_pre(
    sae_input: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_sae rank"],
    bias: Float[Tensor, "d_sae"],
    down: Float[Tensor, "rank d_in"] | None = None,
) -> Float[Tensor, "*batch d_sae"]:
    """``u = x~ @ (weight @ down).T + bias``; without ``down``, ``u = x~ @ weight.T + bias``.

    Args:
        sae_input: ``x~``, shape ``(..., d_in)``; cast to the adapter's dtype.
        weight: shape ``(d_sae, d_in)``, or ``(d_sae, rank)`` where ``down`` is given.
        bias: shape ``(d_sae,)``.
        down: first factor of a weight of low rank, shape ``(rank, d_in)``.

    Returns:
        Shape ``(..., d_sae)``.
    """
    sae_input = sae_input.to(weight.dtype)
    return F.linear(sae_input if down is None else F.linear(sae_input, down), weight, bias)


class Dictionary(Protocol):
    """What ``steer`` needs of an SAE; ``peft_fsrl.FrozenSAE`` is one."""

    def process_in(self, x: Tensor) -> Tensor:
        """``x~``, what the encoder and the adapter read."""

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations ``f`` of the raw ``x``."""

    def decode_update(self, update: Tensor, x: Tensor) -> Tensor:
        """``decode(f + update) - decode(f)`` at the token whose raw activations are ``x``."""


def steer(
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_sae rank"],
    bias: Float[Tensor, "d_sae"],
    down: Float[Tensor, "rank d_in"] | None,
    threshold: Float[Tensor, "#d_sae"] | None,
    *,
    sae: Dictionary,
    activation: str,
    bandwidth: float,
    clamps: bool = True,
    edit: Callable[[Float[Tensor, "*batch d_sae"]], Float[Tensor, "*batch d_sae"]] | None = None,
    measures: bool = True,
    keeps_vector: bool = True,
) -> Steered:
    """``x' = x + decode(relu(f + v)) - decode(f)`` with ``v = act_theta(x~ @ weight.T + bias)``.

    Args:
        x: the wrapped module's output.
        weight: see ``steering_pre``, as for ``bias`` and ``down``.
        bias: see there.
        down: see there.
        threshold: see ``steering_vector``.
        sae: the dictionary in which to steer. Its encoder runs only where a negative ``v`` is
            possible: elsewhere nothing is clamped.
        activation: one of ``ACTIVATIONS``.
        bandwidth: kernel width of ``jumprelu``.
        clamps: ``f'`` is ``relu(f + v)``; without, ``f + v``, for features that carry a sign or may
            become negative.
        edit: applied to ``v`` before it acts (ablation, scaling, top-k). None leaves ``v`` alone.
        measures: also return the norms of ``v``.
        keeps_vector: also return ``v`` and its gate, which are as wide as the SAE.
    """
    u = steering_pre(sae.process_in(x), weight, bias, down)
    v, gate = steering_vector(u, threshold, activation=activation, bandwidth=bandwidth)
    if edit is not None:
        v = edit(v)
    promotes_only = activation in _PROMOTES_ONLY and edit is None
    update = clamped_update(v, sae.encode(x)) if clamps and not promotes_only else v
    return Steered(
        x + sae.decode_update(update, x).to(x.dtype),
        compute_norms(v, gate) if measures else None,
        v if keeps_vector else None,
        gate if keeps_vector else None,
    )


def compute_norms(
    v: Float[Tensor, "*batch d_sae"], gate: Float[Tensor, "*batch d_sae"] | None
) -> Norms:
    """How strongly each token is steered, in float32 or wider.

    Args:
        v: steering vectors.
        gate: of ``jumprelu``, or None.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    held = v.detach()
    return Norms(
        l0=(held != 0).sum(dim=-1).to(wide),
        l1=token_l1(v),
        l2=torch.linalg.vector_norm(v, dim=-1, dtype=wide),
        open_gates=None if gate is None else gate.sum(dim=-1),
    )


def token_l1(v: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch"]:
    """``||v_t||_1`` of each token, in float32 or wider.

    Args:
        v: steering vectors, shape ``(..., d_sae)``.

    Returns:
        Shape ``(...)``.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    return torch.linalg.vector_norm(v, ord=1, dim=-1, dtype=wide)


def masked_mean(
    per_token: Float[Tensor, "batch seq"],
    mask: Float[Tensor, "batch seq"] | None,
    reduction: str = "sequence",
) -> Float[Tensor, ""]:
    """Mean of a per-token quantity over real tokens; padding never counts.

    Args:
        per_token: one value per token, shape ``(batch, seq)``.
        mask: non-zero on real tokens, shape ``(batch, seq)``; None counts every token.
        reduction: ``"sequence"`` takes the mean over the real tokens of each sequence and then over
            sequences, which does not depend on how sequences are grouped into batches of equal
            size; ``"token"`` takes one mean over all real tokens.

    Returns:
        A scalar. A sequence without a real token contributes zero.

    Raises:
        ValueError: if ``reduction`` is neither of the two.
    """
    real = torch.ones_like(per_token) if mask is None else (mask > 0).to(per_token.dtype)
    # A padded token's value is dropped, not multiplied by zero: it may be inf or nan.
    total = torch.where(real > 0, per_token, torch.zeros_like(per_token))
    if reduction == "sequence":
        return (total.sum(dim=-1) / real.sum(dim=-1).clamp(min=1)).mean()
    if reduction == "token":
        return total.sum() / real.sum().clamp(min=1)
    raise ValueError(f"reduction must be 'sequence' or 'token', got {reduction!r}.")
