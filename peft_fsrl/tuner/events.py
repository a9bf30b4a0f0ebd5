"""What a layer tells of one application of an adapter: to observers, and to statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..functional import Norms, compute_norms
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
    """

    layer_name: str
    adapter_name: str
    hidden_states: Float[Tensor, "*batch d_in"]
    steering_vector: Float[Tensor, "*batch d_sae"]
    gate: Float[Tensor, "*batch d_sae"] | None
    sae: FrozenSAE


@dataclass
class TokenStatistics:
    """How strongly one adapter steered each token of one forward pass.

    Attributes:
        layer_name: path of the wrapped module.
        adapter_name: the adapter that acted.
        l0: number of features with ``v != 0``, shape ``(batch, seq)``.
        l1: ``||v||_1``, shape ``(batch, seq)``; carries the graph when the forward did.
        l2: ``||v||_2``, shape ``(batch, seq)``; likewise.
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
Edit = Callable[[Tensor, FrozenSAE], Tensor]

# What is attached by the running thread or task, and counts for it alone.
_OPEN: ContextVar[tuple[Scoped, ...]] = ContextVar("peft_fsrl_attached", default=())


class Scoped:
    """A value that counts only in the thread or task that opened it, and in no copy of a model.

    A server may answer two requests on one model: an ablation for the one must not reach the other.

    Args:
        value: an observer, an edit, or the adapters of a batch.
        places: lists of layers in which it stands for the length of a ``with`` block.
    """

    def __init__(self, value: Any, *places: list[Any]) -> None:
        self.value = value
        self._places = places

    def __enter__(self) -> Scoped:
        for place in self._places:
            place.append(self)
        _OPEN.set((*_OPEN.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _OPEN.set(tuple(other for other in _OPEN.get() if other is not self))
        for place in self._places:
            if self in place:
                place.remove(self)

    @property
    def is_open(self) -> bool:
        """Whether it counts here."""
        # Where a checkpoint is recomputed, the thread is one of autograd's.
        return self in _OPEN.get() or torch._C._current_graph_task_id() != -1


def open_values(attached: Iterable[Any]) -> list[Any]:
    """What counts here of a layer's list: values that stand in it for good, and open scopes'."""
    found = []
    for item in attached:
        if not isinstance(item, Scoped):
            found.append(item)
        elif item.is_open:
            found.append(item.value)
    return found


def token_statistics(event: SteeringEvent) -> TokenStatistics:
    """Reduce the steering vectors of an event to per-token norms, in float32 or wider."""
    norms = compute_norms(event.steering_vector, event.gate)
    return describe_norms(event.layer_name, event.adapter_name, event.hidden_states, norms)


def describe_norms(
    layer_name: str, adapter_name: str, hidden_states: Float[Tensor, "*batch d_in"], norms: Norms
) -> TokenStatistics:
    """The norms of one application, with the tokens at which something is not finite."""
    # The norm is finite exactly where all of v is: no second pass over its many features.
    finite = norms.l1.detach().isfinite() & hidden_states.detach().isfinite().all(dim=-1)
    return TokenStatistics(
        layer_name, adapter_name, **norms._asdict(), nonfinite=(~finite).to(norms.l1.dtype)
    )
