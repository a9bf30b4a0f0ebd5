"""Reports of the strongest steered features at each token of a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..tuner.events import SteeringEvent
from .requests import SteeringRequest
from .rows import Span

# Of each request; older tokens than these are not reported.
MOST_TOKENS = 4096

Notes = dict[str, list[dict[str, Any]]]


def add_notes(
    notes: Notes, place: str, spans: Sequence[Span], event: SteeringEvent, labels: Mapping[int, str]
) -> None:
    """Note one application of an adapter for those of its requests that asked.

    Args:
        notes: by request, to which this adds.
        place: where it steered.
        spans: whose tokens the rows of the event are, one after another.
        event: with rows of tokens.
        labels: by feature.
    """
    row = 0
    for span in spans:
        v = event.steering_vector[row : (row := row + span.stop - span.start)]
        if not span.request.features:
            continue
        strongest = v.abs().topk(min(span.request.features, v.shape[-1])).indices
        values, counts = v.gather(-1, strongest).tolist(), (v != 0).sum(-1).tolist()
        indices = event.sae.feature_index.to(strongest.device)[strongest].tolist()
        for offset, count in enumerate(counts):
            found = zip(indices[offset], values[offset], strict=True)
            features = [
                {"index": index, "value": value, "label": labels.get(index)}
                for index, value in found
                if value
            ]
            token = {"position": span.position + offset, "place": place, "l0": count}
            notes.setdefault(span.name, []).append({**token, "features": features})


def make_report(
    request: SteeringRequest, noted: Iterable[dict[str, Any]], n_tokens: int
) -> dict[str, Any]:
    """What a finished request brings along, in plain JSON values.

    Args:
        request: how it was steered.
        noted: of its tokens.
        n_tokens: how many were read. Asynchronous scheduling computes some ahead, in vain.
    """
    # What was preempted is computed again, and noted again.
    by_place = {(token["position"], token["place"]): token for token in noted}
    tokens = [by_place[key] for key in sorted(by_place) if key[0] < n_tokens]
    return {
        "adapter": request.adapter,
        "strength": request.strength,
        "ablated": list(request.ablated),
        "phase": request.phase,
        "tokens": tokens[-MOST_TOKENS:],
    }
