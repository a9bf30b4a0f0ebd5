"""Tokens of many requests in one tensor: each row is what its own request alone would get."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers import D_IN, bare_layer, naive_steer, tiny_sae
from peft_fsrl.serving.requests import SteeringRequest
from peft_fsrl.serving.rows import Span, steer_rows

SAES = {"one": tiny_sae("jumprelu", dtype="float64"), "two": tiny_sae(dtype="float64")}
LAYERS = {name: bare_layer(sae, seed=seed) for seed, (name, sae) in enumerate(SAES.items())}


def expected_row(x: Tensor, position: int, span: Span) -> Tensor:
    """One token by itself, from the formula: scaled, and with features left out."""
    request = span.request
    in_prompt = position < span.n_prompt
    off = {"all": False, "prompt": not in_prompt, "generation": in_prompt}[request.phase]
    if off or request.strength == 0:
        return x
    adapter, sae = LAYERS[request.adapter].fsrl_adapter["default"], SAES[request.adapter]
    arguments = (sae, x, adapter.weight, adapter.bias, adapter.threshold)
    _, v, _ = naive_steer(*arguments)
    v = v * request.strength
    v[list(request.ablated)] = 0
    f = sae.encode(x)
    return x + (torch.relu(f + v) - f) @ sae.W_dec


def spans_of(*requests: tuple[SteeringRequest, int, int, int]) -> list[Span]:
    spans, start = [], 0
    for request, n, position, n_prompt in requests:
        spans.append(Span(start, start + n, position, n_prompt, request, str(start)))
        start += n
    return spans


@torch.no_grad()
def test_rows_equal_their_own_request_alone() -> None:
    ask = SteeringRequest
    spans = spans_of(
        (ask("one"), 3, 0, 3),
        (ask("two", 0.5), 1, 7, 5),
        (ask("one", 0.0), 2, 0, 2),
        (ask("one", -1.5, (0, 3, 5)), 4, 2, 6),
        (ask("two", phase="prompt"), 3, 4, 6),
        (ask("one", phase="generation"), 3, 4, 6),
        (ask("one", phase="generation"), 2, 0, 2),
        (ask("two", phase="prompt"), 1, 6, 6),
        (ask("two", 2.0, (1,)), 1, 9, 2),
    )
    n = spans[-1].stop
    # Two more rows than tokens: what a graph is padded with is left alone.
    x = torch.randn(n + 2, D_IN, dtype=torch.float64)
    found = x.clone()
    for rows, steered in steer_rows(x, LAYERS, spans):
        found[rows] = steered
    assert torch.equal(found[n:], x[n:])
    for span in spans:
        for row in range(span.start, span.stop):
            expected = expected_row(x[row], span.position + row - span.start, span)
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-12)
            if span.request.strength == 0:
                assert torch.equal(found[row], x[row])


@torch.no_grad()
def test_each_adapter_is_applied_once() -> None:
    seen = []
    ask = SteeringRequest
    requests = [ask("one"), ask("two"), ask("one", 0.5), ask("one", 0.0)]
    spans = spans_of(*((request, 2, 0, 2) for request in requests))
    x = torch.randn(8, D_IN, dtype=torch.float64)
    steer_rows(x, LAYERS, spans, lambda own, event: seen.append((own, event)))
    rows = {tuple(span.name for span in own): event.steering_vector for own, event in seen}
    assert {names: len(v) for names, v in rows.items()} == {("0", "4"): 4, ("2",): 2}
    assert torch.equal(seen[0][1].hidden_states, x[[0, 1, 4, 5]])
    for layer in LAYERS.values():
        assert layer.edits == []
        assert layer.observers == []
