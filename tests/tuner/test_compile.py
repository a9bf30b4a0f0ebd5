"""The compiled steering function: the same numbers, few programs, and a quiet way back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_fsrl.tuner.compile as compiling
from helpers import bare_layer, fsrl_model, only_layer, tiny_sae, token_ids
from peft_fsrl import observe, scale_steering
from peft_fsrl.steering import SteeringMonitor
from peft_fsrl.tuner.events import TokenStatistics

pytestmark = [
    # Raised inside torch while it traces any autograd function, and when inductor is imported.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # The standard deviation of no token.
    pytest.mark.filterwarnings("ignore:std.*degrees of freedom:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "_failed", False)
    compiling._compiled.cache_clear()
    yield
    compiling._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each program that is compiled; compiling by aot_eager, which is quick."""
    made: list[Any] = []
    real = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        made.append(graph)
        return aot_eager(graph, inputs)

    def quick(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **{"backend": backend, **kwargs})

    monkeypatch.setattr(torch, "compile", quick)
    return made


def run(layer: Any, x: Tensor, wanted: bool) -> list[Tensor | None]:
    """Output, norms, and every gradient of a function of all of them."""
    layer.fsrl_adapter["default"].compiles = wanted
    found: list[TokenStatistics] = []
    layer.statistics_observers[:] = [found.append]
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    [norms] = found
    loss = output.float().sin().sum() + norms.l1.square().sum()
    if norms.open_gates is not None:
        loss = loss + norms.open_gates.sum()
    loss.backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    return [output, norms.l0, norms.l1, norms.l2, norms.open_gates, x.grad, *gradients]


@pytest.mark.parametrize(
    ("architecture", "normalization", "activation"),
    [
        ("standard", "none", "soft_threshold"),
        ("gated", "layer_norm", "soft_threshold"),
        ("topk", "constant_norm_rescale", "relu"),
        ("jumprelu", "expected_average_only_in", "jumprelu"),
        ("jumprelu", "none", "gain"),
    ],
)
def test_the_same_numbers(
    architecture: str, normalization: str, activation: str, programs: list[Any]
) -> None:
    sae = tiny_sae(architecture, normalization)
    rank = None if activation == "gain" else 3
    layer = bare_layer(sae, activation=activation, jumprelu_bandwidth=0.4, rank=rank)
    for shape in ((2, 3, 16), (7, 16), (1, 1, 16), (0, 16)):
        x = torch.randn(shape, dtype=torch.float64)
        for found, expected in zip(run(layer, x, True), run(layer, x, False), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert programs


@pytest.mark.parametrize("activation", ["soft_threshold", "jumprelu"])
def test_the_same_numbers_by_the_default_compiler(activation: str) -> None:
    layer = bare_layer(tiny_sae(), torch.float32, activation=activation, jumprelu_bandwidth=0.4)
    x = torch.randn(2, 5, 16)
    for found, expected in zip(run(layer, x, True), run(layer, x, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not compiling._failed


def test_the_same_numbers_under_autocast(programs: list[Any]) -> None:
    layer = bare_layer(tiny_sae(), torch.float32)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(layer, x, True), run(layer, x, False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_the_same_gradients_under_checkpointing(
    use_reentrant: bool | None, programs: list[Any]
) -> None:
    gradients = []
    for wanted in (False, True):
        model = fsrl_model(l1_coeff=0.1, compile=wanted).double().train()
        if use_reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        records: list[Any] = []
        with SteeringMonitor(model, records.append):
            loss = model(token_ids()).logits.square().mean()
        (loss + records[0].tokens[0].l1.mean()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert programs
    for found, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_lengths_do_not_make_programs(programs: list[Any]) -> None:
    layer = bare_layer(tiny_sae(), torch.float32)
    layer.fsrl_adapter["default"].compiles = True
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        batch, length = (int(n) for n in torch.randint(1, 40, (2,), generator=generator))
        layer(torch.randn(batch, length, 16)).sum().backward()
    with torch.no_grad():
        for batch in (1, 2, 5):
            layer(torch.randn(batch, 1, 16))
    # Training and generation, each for one token and for several.
    assert len(programs) <= 4


def test_a_penalty_that_nobody_adds_is_seen(programs: list[Any]) -> None:
    layer = bare_layer(tiny_sae(), torch.float32, l1_coeff=0.1, compile=True).train()
    found: list[TokenStatistics] = []
    layer.statistics_observers[:] = [found.append]
    x = torch.randn(2, 3, 16)
    for _ in range(2):
        (layer(x).sum() + found.pop().l1.sum()).backward()
    layer(x).sum().backward()
    with pytest.warns(UserWarning, match="sparsity penalty in its config"):
        layer(x)
    assert programs


@pytest.mark.parametrize("what", ["observer", "edit", "temporal", "frozen"])
def test_what_needs_more_runs_as_it_is(what: str, programs: list[Any]) -> None:
    sae = tiny_sae("temporal" if what == "temporal" else "standard")
    model, ids = fsrl_model(sae=sae, compile=True), token_ids()
    context: Any = nullcontext()
    if what == "observer":
        context = observe(model, lambda event: None)
    elif what == "edit":
        context = scale_steering(model, 0.5)
    elif what == "frozen":
        only_layer(model).fsrl_adapter.requires_grad_(False)
    with context:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.sum().backward()
    assert programs == []


def test_inside_a_compiled_model_there_is_one_program(programs: list[Any]) -> None:
    model, ids = fsrl_model(compile=True), token_ids()
    expected = model(ids).logits
    programs.clear()
    outer = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outer(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert programs == []


def test_without_a_compiler_it_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls, error = [], RuntimeError("no compiler found")

    def broken(function: Any) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            calls.append(function)
            raise torch._dynamo.exc.BackendCompilerFailed(print, error, None)

        return fail

    broken.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(compiling, "_compiled", broken)
    layer = bare_layer(tiny_sae(), torch.float32)
    x = torch.randn(2, 3, 16)
    expected = layer(x)
    layer.fsrl_adapter["default"].compiles = True
    with caplog.at_level(logging.WARNING):
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
    assert len(calls) == 1
    [message] = caplog.messages
    assert "PEFT_FSRL_COMPILE=0" in message
    assert "BackendCompilerFailed" in message


def test_where_torch_compiles_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on Python 4")

    monkeypatch.setattr(torch, "compile", refuse)
    layer = bare_layer(tiny_sae(), torch.float32)
    x = torch.randn(2, 3, 16)
    expected = layer(x)
    layer.fsrl_adapter["default"].compiles = True
    assert torch.equal(layer(x), expected)
    assert compiling._failed


def test_the_config_decides_and_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    monkeypatch.delenv("PEFT_FSRL_COMPILE", raising=False)
    assert not compiling.compiles(None, x)
    assert compiling.compiles(True, x)
    monkeypatch.setenv("PEFT_FSRL_COMPILE", "1")
    assert compiling.compiles(None, x)
    assert not compiling.compiles(False, x)
    monkeypatch.setenv("PEFT_FSRL_COMPILE", "0")
    assert not compiling.compiles(None, x)
    assert compiling.compiles(True, x)
    monkeypatch.setenv("PEFT_FSRL_COMPILE", "yes")
    with pytest.raises(ValueError, match="PEFT_FSRL_COMPILE to be 0 or 1, found 'yes'"):
        compiling.compiles(None, x)


def test_on_a_cpu_nothing_is_compiled_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_FSRL_COMPILE", raising=False)
    monkeypatch.setattr(torch, "compile", None)
    fsrl_model()(token_ids()).logits.sum().backward()
