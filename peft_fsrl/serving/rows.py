"""Steer the tokens of many requests in one tensor, each by its own request's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..sae.frozen import FrozenSAE
from ..steering import edit_steering, observe
from ..tuner.events import SteeringEvent
from ..tuner.layer import FSRLLayer
from .requests import SteeringRequest

if TYPE_CHECKING:
    from jaxtyping import Float


class Span(NamedTuple):
    """Tokens of one request that are computed together.

    Attributes:
        start: first row of the tensor.
        stop: after the last one.
        position: of the first of these tokens in the request.
        n_prompt: how many tokens the prompt of the request has.
        request: how they are steered.
        name: of the request.
    """

    start: int
    stop: int
    position: int
    n_prompt: int
    request: SteeringRequest
    name: str = ""

    def steered(self) -> Span | None:
        """The part of it that is steered, if any."""
        request, split = self.request, self.start + self.n_prompt - self.position
        start = max(self.start, split) if request.phase == "generation" else self.start
        stop = min(self.stop, split) if request.phase == "prompt" else self.stop
        if request.strength == 0 or start >= stop:
            return None
        return self._replace(start=start, stop=stop, position=self.position + start - self.start)


Watcher = Callable[[Sequence[Span], SteeringEvent], None]


def steer_rows(
    x: Float[Tensor, "rows d_in"],
    layers: Mapping[str, FSRLLayer],
    spans: Sequence[Span],
    watcher: Watcher | None = None,
) -> list[tuple[slice | Tensor, Float[Tensor, "some d_in"]]]:
    """Steer rows of ``x``, with one application of each adapter to all rows that it steers.

    Args:
        x: hidden states of all tokens.
        layers: the steering layer of each adapter at this place; others do not steer here.
        spans: which rows belong to which request, ascending and apart.
        watcher: sees each application, whose rows are those of the spans one after another.

    Returns:
        Rows, and what stands in them afterwards. Rows that no entry names stay as they are.
    """
    written: list[tuple[slice | Tensor, Tensor]] = []
    parts = [part for part in (span.steered() for span in spans) if part is not None]
    for adapter, layer in layers.items():
        own = [part for part in parts if part.request.adapter == adapter]
        if not own:
            continue
        rows = _rows(own, x)
        with ExitStack() as stack:
            if any(part.request.strength != 1 or part.request.ablated for part in own):
                stack.enter_context(edit_steering(layer, _RowEdit(own)))
            if watcher is not None:
                stack.enter_context(observe(layer, partial(watcher, own)))
            written.append((rows, layer(x[rows])))
    return written


class _RowEdit:
    """Scales and ablates each request's rows of the steering vectors."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans

    def __call__(self, v: Tensor, sae: FrozenSAE) -> Tensor:
        v, row = v.clone(), 0
        for span in self._spans:
            own = v[row : (row := row + span.stop - span.start)]
            if span.request.strength != 1:
                own *= span.request.strength
            if span.request.ablated:
                own.index_fill_(-1, sae.positions(span.request.ablated).to(v.device), 0.0)
        return v


def _rows(spans: Sequence[Span], x: Tensor) -> slice | Tensor:
    joined = all(one.stop == other.start for one, other in pairwise(spans))
    if joined:
        return slice(spans[0].start, spans[-1].stop)
    return torch.cat([torch.arange(s.start, s.stop, device=x.device) for s in spans])
