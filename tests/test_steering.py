"""Observing and editing the steering from outside, against naive edits of the formula."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import math
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers import (
    D_IN,
    D_SAE,
    fsrl_model,
    naive_vector,
    only_layer,
    tiny_model,
    tiny_sae,
    token_ids,
)
from peft_fsrl import FSRLConfig
from peft_fsrl.functional import ACTIVATIONS
from peft_fsrl.steering import (
    ForwardRecord,
    SteeringEvent,
    SteeringMonitor,
    ablate_features,
    base_model,
    edit_steering,
    fsrl_layers,
    observe,
    only_features,
    scale_steering,
    token_statistics,
)

FEATURES = (2, 3, 11)


def unsteered(model: PeftModel, **inputs: Any) -> Tensor:
    with model.disable_adapter():
        return model(output_hidden_states=True, **inputs).hidden_states[2]


def steered(model: PeftModel, **inputs: Any) -> Tensor:
    return model(output_hidden_states=True, **inputs).hidden_states[2]


def naive_edit(model: PeftModel, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """The formula with an edited ``v``, by SAELens's own encode and decode."""
    sae, adapter = tiny_sae(), only_layer(model).fsrl_adapter["default"]
    u = sae.process_sae_in(x) @ adapter.weight.T + adapter.bias
    threshold = adapter.threshold_parameter
    v = edit(naive_vector(u, threshold, adapter.activation, adapter.bandwidth)[0])
    f = sae.encode(x)
    return x + sae.decode(torch.relu(f + v)) - sae.decode(f)


def without(v: Tensor) -> Tensor:
    v = v.clone()
    for feature in FEATURES:
        v[..., feature] = 0
    return v


def alone(v: Tensor) -> Tensor:
    return v - without(v)


Edit = Callable[[nn.Module], AbstractContextManager[None]]
EDITS: dict[str, tuple[Edit, Callable[[Tensor], Tensor]]] = {
    "ablate": (lambda m: ablate_features(m, FEATURES), without),
    "only": (lambda m: only_features(m, FEATURES), alone),
    "scale": (lambda m: scale_steering(m, 1.5), lambda v: 1.5 * v),
    "scale some": (
        lambda m: scale_steering(m, -1.5, features=FEATURES),
        lambda v: without(v) - 1.5 * alone(v),
    ),
    "reverse": (lambda m: scale_steering(m, -2.0), lambda v: -2 * v),
    "edit": (lambda m: edit_steering(m, lambda v, sae: torch.square(v)), torch.square),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", EDITS)
def test_edits(name: str, activation: str) -> None:
    edit, naive = EDITS[name]
    model, ids = fsrl_model(activation=activation), token_ids()
    x, before = unsteered(model, input_ids=ids), steered(model, input_ids=ids)
    with edit(model):
        edited = steered(model, input_ids=ids)
    torch.testing.assert_close(edited, naive_edit(model, x, naive), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(edited, before)
    assert torch.equal(steered(model, input_ids=ids), before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scale_zero_is_the_base_and_one_the_adapter(activation: str) -> None:
    model, ids = fsrl_model(activation=activation), token_ids()
    expected = model(ids).logits
    with scale_steering(model, 0.0):
        assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    with scale_steering(model, 1.0):
        torch.testing.assert_close(model(ids).logits, expected)


def test_ablating_every_feature_is_the_base() -> None:
    model, ids = fsrl_model(), token_ids()
    with ablate_features(model, range(D_SAE)):
        assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    with only_features(model, []):
        assert torch.equal(model(ids).logits, tiny_model()(ids).logits)


def test_edits_apply_in_order_and_nest() -> None:
    model, seen = fsrl_model(), []
    with (
        edit_steering(model, lambda v, sae: v + 1),
        edit_steering(model, lambda v, sae: v * 2),
        observe(model, lambda event: seen.append(event.steering_vector)),
        ablate_features(model, [0]),
    ):
        model(token_ids())
    with observe(model, lambda event: seen.append(event.steering_vector)):
        model(token_ids())
    torch.testing.assert_close(seen[0][..., 1:], (seen[1][..., 1:] + 1) * 2)
    assert (seen[0][..., 0] == 0).all()


def test_edits_end_with_an_exception() -> None:
    model = fsrl_model()
    with pytest.raises(RuntimeError), ablate_features(model, [0]), observe(model, print):
        raise RuntimeError
    assert only_layer(model).edits == only_layer(model).observers == []


@pytest.mark.parametrize("control", [ablate_features, only_features])
@pytest.mark.parametrize("feature", [-1, D_SAE, 10**6])
def test_feature_out_of_range(control: Any, feature: int) -> None:
    with pytest.raises(IndexError, match=f"Feature {feature} does not exist.*0 to {D_SAE - 1}"):
        control(fsrl_model(), [0, feature]).__enter__()


def test_layer_names() -> None:
    model = fsrl_model(target_modules=["layers.0", "layers.2"], sae=tiny_sae(metadata={}))
    assert set(fsrl_layers(model)) == {"model.layers.0", "model.layers.2"}
    seen: dict[str, Tensor] = {}
    with (
        scale_steering(model, 0.0, "model.layers.2"),
        observe(model, lambda e: seen.update({e.layer_name: e.steering_vector})),
    ):
        model(token_ids())
    assert (seen["model.layers.2"] == 0).all()
    assert (seen["model.layers.0"] != 0).any()
    with pytest.raises(ValueError, match=r"No FSRL adapter wraps 'layers\.2'; found \['model\."):
        scale_steering(model, 0.0, "layers.2").__enter__()


def test_model_without_an_adapter() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no FSRL adapter"):
        fsrl_layers(tiny_model())


def test_base_model() -> None:
    plain, model = tiny_model(), fsrl_model()
    assert base_model(plain) is plain
    assert base_model(model) is model.get_base_model()


def test_what_an_observer_sees() -> None:
    model, ids, events = fsrl_model(activation="jumprelu"), token_ids(), []
    with observe(model, events.append):
        model(ids)
        with model.disable_adapter():
            model(ids)
    [event] = events
    assert isinstance(event, SteeringEvent)
    assert (event.layer_name, event.adapter_name) == ("model.layers.1", "default")
    assert torch.equal(event.hidden_states, unsteered(model, input_ids=ids))
    assert event.steering_vector.shape == event.gate.shape == (*ids.shape, D_SAE)
    assert event.sae is only_layer(model).fsrl_sae["default"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_token_statistics_by_loops(dtype: torch.dtype) -> None:
    v = torch.randn(2, 3, D_SAE, dtype=torch.float64).to(dtype)
    v[torch.rand(v.shape) < 0.5] = 0
    gate = (v > 0).float()
    layer = only_layer(fsrl_model())
    x, sae = torch.zeros(2, 3, D_IN), layer.fsrl_sae["default"]
    event = SteeringEvent("l", "a", x, v, gate, sae)
    statistics = token_statistics(event)
    for b in range(2):
        for t in range(3):
            values = v[b, t].tolist()
            assert statistics.l0[b, t].item() == sum(value != 0 for value in values)
            assert statistics.l1[b, t].item() == pytest.approx(sum(map(abs, values)), rel=1e-5)
            norm = math.sqrt(sum(value * value for value in values))
            assert statistics.l2[b, t].item() == pytest.approx(norm, rel=1e-5)
            assert statistics.open_gates[b, t].item() == sum(value > 0 for value in values)
    assert statistics.l1.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def monitored(model: PeftModel, *args: Any, **kwargs: Any) -> list[ForwardRecord]:
    records: list[ForwardRecord] = []
    with SteeringMonitor(model, records.append):
        model(*args, **kwargs)
    return records


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_monitor_finds_the_mask(task_type: str | None) -> None:
    model, ids = fsrl_model(task_type=task_type), token_ids()
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    [record] = monitored(model, input_ids=ids, attention_mask=mask)
    assert torch.equal(record.mask, mask)
    [record] = monitored(model, input_ids=ids)
    assert record.mask is None
    assert record.tokens[0].l1.shape == ids.shape


def test_monitor_finds_a_positional_mask() -> None:
    model, ids = fsrl_model(task_type=None), token_ids()
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    [record] = monitored(model, ids, mask)
    assert torch.equal(record.mask, mask)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_monitor_tells_training_apart(training: bool, gradients: bool) -> None:
    model = fsrl_model().train(training)
    with torch.set_grad_enabled(gradients):
        [record] = monitored(model, token_ids())
    assert record.training == (training and gradients)
    assert record.tokens[0].l1.requires_grad == gradients


def test_monitor_is_silent_without_steering_and_after_closing() -> None:
    model, records = fsrl_model(), []
    monitor = SteeringMonitor(model, records.append)
    with model.disable_adapter():
        model(token_ids())
    assert records == []
    monitor.close()
    monitor.close()
    model(token_ids())
    assert records == []
    assert only_layer(model).observers == []
    inner = model.get_base_model()
    assert not inner._forward_hooks
    assert not inner._forward_pre_hooks


def test_monitor_after_a_failed_forward() -> None:
    model, records = fsrl_model(), []
    with SteeringMonitor(model, records.append):
        with pytest.raises(IndexError):
            model(torch.full((1, 2), 10**6))
        model(token_ids(2, 3))
    [record] = records
    assert record.tokens[0].l1.shape == (2, 3)


def test_monitor_aligns_the_mask_with_a_cached_continuation() -> None:
    model, ids, records = fsrl_model(), token_ids(2, 5), []
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with SteeringMonitor(model, records.append):
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert [record.tokens[0].l1.shape[1] for record in records] == [5, 1, 1]
    assert torch.equal(records[0].mask, mask)
    assert all((record.mask == 1).all() for record in records[1:])


def test_observed_models_can_be_copied() -> None:
    model = fsrl_model()
    expected = model(token_ids()).logits
    with SteeringMonitor(model, lambda record: None), ablate_features(model, []):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(token_ids()).logits, expected)


@pytest.mark.parametrize("control", [ablate_features, only_features])
def test_features_are_those_of_the_active_adapter(control: Any) -> None:
    model, ids = fsrl_model(), token_ids()
    small = FSRLConfig(layer=1, sae=tiny_sae(d_sae=8), init_scale=0.3, task_type="CAUSAL_LM")
    model.add_adapter("small", small)
    with torch.no_grad(), control(model, [20]):
        model(input_ids=ids)
    model.set_adapter("small")
    with pytest.raises(IndexError, match="features 0 to 7"), control(model, [20]):
        pass


def test_attached_things_stay_in_their_thread() -> None:
    """As on a server that answers two requests with one model."""
    model, ids = fsrl_model(), token_ids()
    plain = unsteered(model, input_ids=ids)
    with torch.no_grad():
        trained = model(ids).logits
        with scale_steering(model, 0.0):
            base = model(ids).logits
    inside, other = threading.Event(), threading.Event()
    found: dict[str, Tensor] = {}
    events: list[SteeringEvent] = []

    def first() -> None:
        with torch.no_grad(), scale_steering(model, 0.0), observe(model, events.append):
            inside.set()
            assert other.wait(60)
            found["first"] = model(ids).logits

    def second() -> None:
        assert inside.wait(60)
        with torch.no_grad():
            found["second"] = model(ids).logits
        other.set()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["first"], base)
    assert torch.equal(found["second"], trained)
    assert not torch.equal(base, trained)
    assert len(events) == 1
    assert torch.equal(events[0].hidden_states, plain)
    assert only_layer(model).edits == only_layer(model).observers == []


def test_attached_things_stay_in_their_task() -> None:
    model, ids = fsrl_model(), token_ids()

    async def run(scale: float) -> Tensor:
        with scale_steering(model, scale):
            await asyncio.sleep(0.01)
            return model(ids).logits.detach()

    async def both() -> list[Tensor]:
        return await asyncio.gather(run(0.0), run(1.0), run(0.0))

    first, second, third = asyncio.run(both())
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_a_copy_of_the_context_carries_what_is_attached() -> None:
    model, ids = fsrl_model(), token_ids()
    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            found.append(model(ids).logits)

    with scale_steering(model, 0.0):
        run()
        thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
        thread.start()
        thread.join()
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_inside_a_block_is_outside_of_it(clone: Any) -> None:
    model = fsrl_model()
    layer = only_layer(model)
    x = torch.randn(2, 3, D_IN)
    expected = layer._steer("default", x)
    with scale_steering(model, 0.0):
        other = clone(layer)
        assert torch.equal(layer._steer("default", x), x)
        torch.testing.assert_close(other._steer("default", x), expected)
    assert layer.edits == other.edits == []
