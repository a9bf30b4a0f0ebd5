"""Nan and inf: a model goes on and they are counted; training stops and keeps what is sound."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers import (
    ARCHITECTURES,
    D_IN,
    bare_layer,
    fits,
    fsrl_model,
    only_layer,
    tiny_sae,
    token_ids,
)
from peft_fsrl import with_fsrl
from peft_fsrl.functional import ACTIVATIONS
from peft_fsrl.steering import (
    ForwardRecord,
    SteeringEvent,
    SteeringMonitor,
    TokenStatistics,
    ablate_features,
    observe,
    only_features,
    scale_steering,
    token_statistics,
    top_k_steering,
)
from peft_fsrl.training import NonfiniteReport, find_checkpoint

BAD = [float("nan"), float("inf"), -float("inf")]


def broken(value: float, **settings: Any) -> Any:
    """A model whose steered layer gives ``value`` at the last token of the first row."""
    model = fsrl_model(**settings)

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, -1, 0] = value
        return output

    model.get_base_model().model.layers[1].mlp.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("architecture", "activation"),
    [(name, each) for name in ARCHITECTURES for each in ACTIVATIONS if fits(name, each)],
)
def test_the_layer_passes_them_on(architecture: str, activation: str, value: float) -> None:
    layer = bare_layer(tiny_sae(architecture), torch.float32, activation=activation)
    seen: list[TokenStatistics] = []
    layer.observers.append(lambda event: seen.append(token_statistics(event)))
    x = torch.randn(2, 5, D_IN)
    x[1, 2, 3] = value
    output = layer(x)
    assert not output[1, 2].isfinite().all()
    expected = torch.zeros(2, 5)
    expected[1, 2] = 1
    if layer.fsrl_sae["default"].contextual:
        # Its encoder reads the tokens before, so those after are bad as well.
        assert seen[0].nonfinite[1, 2] == 1
        assert seen[0].nonfinite[0].sum() == 0
        return
    assert torch.equal(seen[0].nonfinite, expected)
    clean = x.clone()
    clean[1, 2] = 0
    others = torch.ones(2, 5, dtype=torch.bool)
    others[1, 2] = False
    torch.testing.assert_close(output[others], layer(clean)[others])


@pytest.mark.parametrize("name", ["weight", "bias", "threshold"])
def test_a_broken_adapter_is_counted(name: str) -> None:
    layer = bare_layer(tiny_sae(), torch.float32)
    with torch.no_grad():
        layer.fsrl_adapter["default"].get_parameter(name)[3] = float("nan")
    seen: list[TokenStatistics] = []
    layer.observers.append(lambda event: seen.append(token_statistics(event)))
    output = layer(torch.randn(2, 5, D_IN))
    assert torch.equal(seen[0].nonfinite, torch.ones(2, 5))
    assert output.isnan().any(dim=-1).all()


def test_counts_of_finite_and_of_huge_values_are_zero() -> None:
    layer = bare_layer(tiny_sae(), torch.float32).half()
    seen: list[TokenStatistics] = []
    layer.observers.append(lambda event: seen.append(token_statistics(event)))
    # Sums over the width would overflow in float16; no element does.
    x = torch.full((1, 2, D_IN), 60000.0, dtype=torch.float16)
    layer.fsrl_adapter["default"].requires_grad_(False).weight.zero_()
    layer(x)
    assert torch.equal(seen[0].nonfinite, torch.zeros(1, 2))


@pytest.mark.parametrize("value", BAD)
def test_forward_generation_and_controls_go_on(value: float) -> None:
    model, sound, ids = broken(value), fsrl_model(), token_ids(2, 7)
    for control in (
        lambda model: ablate_features(model, [1]),
        lambda model: only_features(model, [1]),
        lambda model: scale_steering(model, 2.0),
        lambda model: scale_steering(model, 0.0),
        lambda model: top_k_steering(model, 3),
    ):
        with control(model), control(sound), torch.no_grad():
            logits = model(input_ids=ids).logits
            torch.testing.assert_close(logits[1], sound(input_ids=ids).logits[1])
            assert not logits[0].isfinite().all()
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    out = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert out.shape == (2, 10)
    assert torch.equal(out[1], sound.generate(input_ids=ids, attention_mask=mask, **settings)[1])


@pytest.mark.parametrize("value", BAD)
def test_the_report_counts_real_tokens_and_names_the_place(value: float) -> None:
    model, report, ids = broken(value), NonfiniteReport(), token_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.no_grad(), SteeringMonitor(model, report.add):
        model(input_ids=ids, attention_mask=mask)
    assert report.counts() == {}
    report.warn()
    for expected in (1, 2):
        with torch.no_grad(), SteeringMonitor(model, report.add):
            model(input_ids=ids)
        assert report.counts() == {("default", "model.layers.1"): expected}
        if expected == 1:
            place = r"1 tokens where adapter 'default' steers 'model\.layers\.1'"
            with pytest.warns(UserWarning, match=f"nan or inf in {place}"):
                report.warn()
        else:
            # Once for each place.
            report.warn()


def test_nothing_is_read_from_the_device_until_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = broken(float("nan")), NonfiniteReport()

    def read(*_: Any) -> Any:
        raise AssertionError("a value was read during the forward pass")

    def collect(event: SteeringEvent) -> None:
        for name in ("__bool__", "__int__", "__float__", "item", "tolist"):
            monkeypatch.setattr(Tensor, name, read)
        report.add(ForwardRecord(torch.ones(2, 7), False, [token_statistics(event)]))
        monkeypatch.undo()

    with torch.no_grad(), observe(model, collect):
        model(input_ids=token_ids(2, 7))
    assert report.counts() == {("default", "model.layers.1"): 1}


def test_no_warning_without_cause() -> None:
    model, report = fsrl_model(), NonfiniteReport()
    with warnings.catch_warnings(), torch.no_grad(), SteeringMonitor(model, report.add):
        warnings.simplefilter("error")
        model(input_ids=token_ids())
        report.warn()
    assert report.counts() == {}


def trainer_of(model: Any, folder: Path, **settings: Any) -> Any:
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(2, 7).tolist()]
    settings = {"max_steps": 2, "logging_steps": 1, "optim": "sgd", **settings}
    args = TrainingArguments(str(folder), report_to="none", use_cpu=True, **settings)
    return with_fsrl(Trainer)(model=model, args=args, train_dataset=Dataset.from_list(rows))


def tensors(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_run_stops_at_the_step_that_turns_nan(tmp_path: Path) -> None:
    """With the place where it began, and before the step has changed anything."""
    model = broken(float("inf"))
    before = tensors(model)
    with pytest.raises(FloatingPointError, match=r"step 1 is nan.*steers 'model\.layers\.1'"):
        trainer_of(model, tmp_path).train()
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())


def test_a_loss_that_divides_by_zero_is_explained(tmp_path: Path) -> None:
    trainer = trainer_of(fsrl_model(), tmp_path)
    rows = [{"input_ids": ids, "labels": [-100] * 7} for ids in token_ids(2, 7).tolist()]
    trainer.train_dataset = Dataset.from_list(rows)
    with pytest.raises(FloatingPointError, match=r"step 1 is nan.*`prepare_preferences`"):
        trainer.train()


class Diverges(TrainerCallback):
    """Spoils a parameter after a step, as a gradient that is no number does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            only_layer(kwargs["model"]).fsrl_adapter["default"].bias.data[3] = float("nan")


@pytest.mark.parametrize("step", [2, 3])
def test_an_adapter_that_diverged_never_takes_the_place_of_a_sound_one(
    step: int, tmp_path: Path
) -> None:
    every = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    trainer = trainer_of(fsrl_model(), tmp_path, **every)
    trainer.save_model()
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    trainer.add_callback(Diverges(step))
    with pytest.raises(FloatingPointError, match=r"not saved.*bias"):
        trainer.train()
    sound = find_checkpoint(tmp_path, True)
    assert sound.endswith(f"checkpoint-{step - 1}")
    for tensor in load_file(f"{sound}/adapter_model.safetensors").values():
        assert tensor.isfinite().all()
    with pytest.raises(FloatingPointError, match="is as it was before"):
        trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights


def test_what_the_base_model_gives_counts_where_nothing_is_steered() -> None:
    model, report = broken(float("inf")), NonfiniteReport()
    with torch.no_grad(), SteeringMonitor(model, report.add), scale_steering(model, 0.0):
        model(input_ids=token_ids(2, 7))
    assert report.counts() == {("default", "model.layers.1"): 1}
