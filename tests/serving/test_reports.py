"""What a request brings along: its own tokens, the strongest features first, bounded."""

from __future__ import annotations

import torch

from helpers import bare_layer, tiny_sae
from peft_fsrl.serving.reports import MOST_TOKENS, Notes, add_notes, make_report
from peft_fsrl.serving.requests import SteeringRequest
from peft_fsrl.serving.rows import Span
from peft_fsrl.tuner.events import SteeringEvent


def test_each_request_gets_its_own_rows() -> None:
    v = torch.zeros(4, 24)
    v[0, 3], v[2, 5], v[2, 7], v[3, 1] = 1.0, -2.0, 0.5, 4.0
    sae = bare_layer(tiny_sae()).fsrl_sae["default"]
    event = SteeringEvent("layer", "default", torch.zeros(4, 16), v, None, sae)
    quiet, asks = SteeringRequest("one"), SteeringRequest("one", features=2)
    spans = [Span(0, 1, 0, 1, quiet, "a"), Span(4, 7, 8, 9, asks, "b")]
    notes: Notes = {}
    add_notes(notes, "layers.1", spans, event, {5: "style"})
    assert list(notes) == ["b"]
    assert [token["position"] for token in notes["b"]] == [8, 9, 10]
    assert [token["l0"] for token in notes["b"]] == [0, 2, 1]
    assert notes["b"][1]["features"] == [
        {"index": 5, "value": -2.0, "label": "style"},
        {"index": 7, "value": 0.5, "label": None},
    ]


def test_tokens_are_told_once_and_in_order() -> None:
    def note(position: int, l0: int) -> dict[str, object]:
        return {"position": position, "place": "layers.1", "l0": l0, "features": []}

    request = SteeringRequest("one", 0.5, (1, 2), "prompt", 3)
    # Preempted after two tokens and computed again; and one token ahead of the end.
    noted = [note(0, 1), note(1, 1), note(0, 2), note(1, 2), note(2, 2), note(3, 9)]
    report = make_report(request, noted, n_tokens=3)
    assert report.pop("tokens") == [note(0, 2), note(1, 2), note(2, 2)]
    assert report == {"adapter": "one", "strength": 0.5, "ablated": [1, 2], "phase": "prompt"}
    many = make_report(request, [note(i, 0) for i in range(MOST_TOKENS + 5)], 10**6)
    assert [token["position"] for token in many["tokens"]] == list(range(5, MOST_TOKENS + 5))
