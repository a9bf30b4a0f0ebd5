"""Encoders of SAEs as what they are feature by feature: affine above a threshold, zero below it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import functional
from ..sae.frozen import FrozenSAE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class NotAffineError(ValueError):
    """FSRL is not affine around some tokens, or nothing is known that would prove it.

    Args:
        reason: what stands in the way.
        tokens: positions of the tokens, as far as they are known.
    """

    def __init__(self, reason: str, tokens: tuple[tuple[int, ...], ...] = ()) -> None:
        super().__init__(reason)
        self.tokens = tokens


@dataclass(frozen=True)
class FeatureEncoder:
    """``f = slope * z + intercept`` where ``z = rows @ x + offset > threshold``, else 0.

    For a top-k encoder, moreover, only where ``z`` is among the ``k`` largest of all features.
    ``columns`` are the features that are steered; None for all.
    """

    rows: Float[Tensor, "n d_in"]
    offset: Float[Tensor, "n"]
    threshold: Float[Tensor, "n"]
    slope: Float[Tensor, "n"]
    intercept: Float[Tensor, "n"]
    k: int | None = None
    columns: Tensor | None = None

    @property
    def constant(self) -> Float[Tensor, "n"]:
        """``f - slope * rows @ x`` of an active feature."""
        return self.slope * self.offset + self.intercept

    def chosen(self, values: Tensor) -> Tensor:
        """Of values for all features, those for the steered ones."""
        return values if self.columns is None else values[self.columns]


def affine_input(sae: FrozenSAE) -> tuple[float, Float[Tensor, "d_in"]]:
    """``(s, t)`` of an SAE whose input processing is ``x~ = s x + t``.

    Raises:
        NotAffineError: for run-time normalization, which divides by a norm of ``x``.
    """
    name = sae.module.cfg.normalize_activations
    zero = torch.zeros(sae.info.d_in, dtype=sae.dtype, device=sae.device)
    if functional.normalization_scale(zero + 1, name) is not None:
        raise NotAffineError(
            f"This SAE normalizes each token when it runs (normalize_activations={name!r}), so "
            "FSRL divides by a norm of x and is affine around no token: no LoRA equals it on any "
            "ball. `to_lora` still fits the best single LoRA to it."
        )
    shift = sae.process_in(zero)
    return float((sae.process_in(zero + 1) - shift)[0]), shift


def feature_encoder(sae: FrozenSAE) -> FeatureEncoder | None:
    """The encoder of an SAE in this form; None for one that does not have it.

    Standard, gated, jumprelu and topk have it. In a gated SAE gate and magnitude look along one
    direction, so that both conditions together are one threshold.
    """
    scale, shift = affine_input(sae)
    module, architecture = sae.module, sae.info.architecture
    if architecture not in {"standard", "gated", "jumprelu", "topk"}:
        return None
    rows = module.W_enc.T * scale
    offset = shift @ module.W_enc
    zero, one = torch.zeros_like(offset), torch.ones_like(offset)
    if architecture == "gated":
        slope = module.r_mag.exp()
        threshold = torch.maximum(-module.b_gate, -module.b_mag / slope)
        return FeatureEncoder(rows, offset, threshold, slope, module.b_mag)
    offset = offset + module.b_enc
    if architecture == "standard":
        return FeatureEncoder(rows, offset, zero, one, zero)
    if architecture == "jumprelu":
        return FeatureEncoder(rows, offset, module.threshold.clamp(min=0), one, zero)
    if module.cfg.rescale_acts_by_decoder_norm:
        norm = module.W_dec.norm(dim=-1)
        rows, offset = rows * norm[:, None], offset * norm
    columns = None if sae.features is None else sae.feature_index.to(sae.device)
    return FeatureEncoder(rows, offset, zero, one, zero, module.cfg.k, columns)


def ranking_distances(
    encoder: FeatureEncoder, z: Float[Tensor, "n"]
) -> tuple[Bool[Tensor, "n"], Float[Tensor, "n"]]:
    """How far the ``k`` largest of a top-k encoder are from changing.

    Returns:
        Whether each feature is among the ``k``, and a distance in ``x`` within which that cannot
        change for it: to the nearest place where it is level with a feature from the other side.
        Infinite where there is no other side.
    """
    inside = torch.zeros_like(z, dtype=torch.bool)
    inside[z.topk(encoder.k or 0).indices] = True
    ins, outs = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
    distance = torch.full_like(z, torch.inf)
    if len(outs) and len(ins):
        squares = encoder.rows.square().sum(dim=1)
        sums = squares[ins, None] + squares[outs]
        # The difference of two norms cancels: what rounding may have taken is put back, so that a
        # distance is never too large.
        gradients = (sums - 2 * encoder.rows[ins] @ encoder.rows[outs].T).clamp(min=0)
        pairs = (z[ins, None] - z[outs]) / (gradients + 1e-12 * sums).sqrt()
        distance[ins], distance[outs] = pairs.amin(dim=1), pairs.amin(dim=0)
    return inside, distance
