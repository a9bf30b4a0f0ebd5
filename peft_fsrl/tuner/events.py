"""What a layer tells of one application of an adapter: to observers, and to statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..sae.frozen import FrozenSAE

if TYPE_CHECKING:
    from jaxtyping import Float


class SteeringEvent(NamedTuple):
    """One application of one adapter at one layer, as observers see it.

    Attributes:
        layer_name: path of the wrapped module in the base model.
        adapter_name: the adapter that acted.
        hidden_states: the wrapped module's own output, shape ``(batch, seq, d_in)``.
        steering_vector: ``v`` in feature space as it acted, shape ``(batch, seq, n_features)``;
            ``sae.feature_index`` says which features these are.
        gate: ``jumprelu``'s differentiable gate of the same shape, or None.
        sae: the SAE whose features are steered, on the device of the layer.
        l1: ``||v||_1`` of each token, shape ``(batch, seq)``, float32 or wider.
        open_gates: sum of ``gate`` over the features, shape ``(batch, seq)``, or None.
    """

    layer_name: str
    adapter_name: str
    hidden_states: Float[Tensor, "*batch d_in"]
    steering_vector: Float[Tensor, "*batch d_sae"]
    gate: Float[Tensor, "*batch d_sae"] | None
    sae: FrozenSAE
    l1: Float[Tensor, "*batch"]
    open_gates: Float[Tensor, "*batch"] | None


@dataclass
class TokenStatistics:
    """How strongly one adapter steered each token of one forward pass.

    Attributes:
        layer_name: path of the wrapped module.
        adapter_name: the adapter that acted.
        l0: number of features with ``v != 0``, shape ``(batch, seq)``.
        l1: ``||v||_1``, shape ``(batch, seq)``; carries the graph when the forward did.
        l2: ``||v||_2``, shape ``(batch, seq)``.
        open_gates: differentiable number of open gates of ``jumprelu``, ``(batch, seq)``, or None.
        nonfinite: 1 for a token with nan or inf in the hidden states or in ``v``, else 0, shape
            ``(batch, seq)``.
    """

    layer_name: str
    adapter_name: str
    l0: Float[Tensor, "batch seq"]
    l1: Float[Tensor, "batch seq"]
    l2: Float[Tensor, "batch seq"]
    open_gates: Float[Tensor, "batch seq"] | None
    nonfinite: Float[Tensor, "batch seq"]


Observer = Callable[[SteeringEvent], None]
StatisticsObserver = Callable[[TokenStatistics], None]


def token_statistics(event: SteeringEvent) -> TokenStatistics:
    """Reduce a steering vector to per-token norms, in float32 or wider."""
    v = event.steering_vector.detach()
    wide = v.to(event.l1.dtype)
    return TokenStatistics(
        event.layer_name,
        event.adapter_name,
        l0=(v != 0).sum(dim=-1).to(wide.dtype),
        l1=event.l1,
        l2=wide.norm(dim=-1),
        open_gates=event.open_gates,
        nonfinite=nonfinite_tokens(event.hidden_states, event.l1),
    )


def nonfinite_tokens(
    hidden_states: Float[Tensor, "*batch d_in"], l1: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """1 for a token with nan or inf in the hidden states or in ``v``, else 0; dtype of ``l1``."""
    # The norm is finite exactly where all of v is: no second pass over its many features.
    finite = l1.detach().isfinite() & hidden_states.detach().isfinite().all(dim=-1)
    return (~finite).to(l1.dtype)
