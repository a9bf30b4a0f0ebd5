"""What must not matter to training: padding, accumulation, checkpointing, precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from helpers import (
    D_SAE,
    SIMPO,
    TRAINING,
    fsrl_model,
    naive_vector,
    only_layer,
    tiny_model,
    tiny_preferences,
    tiny_sae,
    tiny_tokenizer,
    token_ids,
)
from peft_fsrl import with_fsrl
from peft_fsrl.steering import ForwardRecord, SteeringMonitor, observe
from peft_fsrl.training.penalty import SparsityPenalty

pytestmark = pytest.mark.filterwarnings(
    # transformers 5.23 renamed them.
    "ignore:`gradient_checkpointing:FutureWarning"
)
COMMON = {
    **TRAINING,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
    "remove_unused_columns": False,
}


def double_model(**settings: Any) -> PeftModel:
    settings.setdefault("l1_coeff", 0.7)
    torch.manual_seed(0)
    return fsrl_model(tiny_model().double(), sae=tiny_sae(dtype="float64"), **settings)


def simpo_trainer(model: nn.Module, directory: Path, **settings: Any) -> Any:
    args = CPOConfig(str(directory), **{**COMMON, **SIMPO, **settings})
    return with_fsrl(CPOTrainer)(
        model, args=args, train_dataset=tiny_preferences(12), processing_class=tiny_tokenizer()
    )


def step(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch."""
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    assert actual[1].keys() == expected[1].keys()
    assert all(gradient.abs().max() > 1e-6 for gradient in expected[1].values())
    torch.testing.assert_close(actual[0], expected[0], rtol=rtol, atol=0.0)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=rtol, atol=rtol, msg=name)


def pad(batch: dict[str, Any], side: str, width: int, token: int) -> dict[str, Any]:
    """The same examples with more padding on one side."""
    fill = {"input_ids": token, "attention_mask": 0, "labels": -100}
    margins = (width, 0) if side == "left" else (0, width)
    padded = {}
    for key, value in batch.items():
        kind = next((name for name in fill if key.endswith(name)), None)
        known = kind is not None and isinstance(value, Tensor)
        padded[key] = nn.functional.pad(value, margins, value=fill[kind]) if known else value
    return padded


@pytest.mark.parametrize("token", [0, 17])
@pytest.mark.parametrize(("side", "width"), [("right", 5), ("left", 5)])
def test_padding_of_preferences(side: str, width: int, token: int, tmp_path: Path) -> None:
    trainer = simpo_trainer(double_model(), tmp_path, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["chosen_attention_mask"] == 0).any(), "the test needs padding"
    assert_same(step(trainer, pad(batch, side, width, token)), step(trainer, batch))


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize(("side", "width"), [("right", 3), ("left", 3)])
def test_padding_of_labeled_text(side: str, width: int, reduction: str, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), **COMMON)
    model = double_model(penalty_reduction=reduction, activation="jumprelu", jumprelu_bandwidth=0.5)
    trainer = with_fsrl(Trainer)(model, args=args)
    ids = token_ids(2, 6)
    # After padding, even a first token has one before it that could predict it.
    labels = ids.index_fill(1, torch.tensor([0]), -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    assert_same(step(trainer, pad(batch, side, width, 9)), step(trainer, batch))


def run(kind: str, model: nn.Module, directory: Path, batch_size: int) -> dict[str, Tensor]:
    """Adapter after three steps of four pairs each, in micro-batches of a given size."""
    settings = {
        **COMMON,
        "max_steps": 3,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 4 // batch_size,
    }
    trainer_class, args = {
        "SimPO": (CPOTrainer, CPOConfig(str(directory), **settings, **SIMPO)),
        "DPO": (DPOTrainer, DPOConfig(str(directory), **settings)),
    }[kind]
    with_fsrl(trainer_class)(
        model, args=args, train_dataset=tiny_preferences(12), processing_class=tiny_tokenizer()
    ).train()
    parameters = only_layer(model).fsrl_adapter["default"].named_parameters()
    return {name: p.detach() for name, p in parameters}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", ["SimPO", "DPO"])
def test_runs_do_not_depend_on_micro_batches(kind: str, batch_size: int, tmp_path: Path) -> None:
    whole = run(kind, double_model(), tmp_path, 4)
    start = only_layer(double_model()).fsrl_adapter["default"]
    # DPO's fused head computes in float32.
    rtol = 1e-8 if kind == "SimPO" else 1e-4
    split = run(kind, double_model(), tmp_path, batch_size)
    for name, value in whole.items():
        assert (value - start.get_parameter(name)).abs().max() > 1e-3, "three steps must move it"
        torch.testing.assert_close(split[name], value, rtol=rtol, atol=rtol, msg=name)


def test_the_mean_over_tokens_depends_on_micro_batches(tmp_path: Path) -> None:
    whole, split = (
        run("SimPO", double_model(penalty_reduction="token"), tmp_path, size) for size in (4, 1)
    )
    assert (whole["weight"] - split["weight"]).abs().max() > 1e-5


@contextmanager
def checkpointing(model: PeftModel, use_reentrant: bool | None) -> Iterator[None]:
    """Gradient checkpointing as TRL switches it on; None leaves it off."""
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    yield


def penalized_step(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss on the logits plus the penalty, and the adapter's gradients."""
    model.train().zero_grad()
    records: list[ForwardRecord] = []
    with SteeringMonitor(model, records.append):
        logits = model(input_ids=token_ids(2, 5), use_cache=False).logits
    [record] = records
    loss = logits.square().mean() + SparsityPenalty(model)(record)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if "fsrl" in n}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("settings", [{}, {"activation": "jumprelu", "l0_coeff": 0.4}, {"rank": 3}])
def test_checkpointing_counts_once_and_changes_nothing(
    settings: dict[str, Any], use_reentrant: bool
) -> None:
    plain = double_model(jumprelu_bandwidth=0.5, **settings)
    expected = penalized_step(plain)
    model = double_model(jumprelu_bandwidth=0.5, **settings)
    applications = []
    with (
        checkpointing(model, use_reentrant),
        observe(model, lambda event: applications.append(event.layer_name)),
    ):
        assert_same(penalized_step(model), expected, rtol=1e-12)
    assert applications == ["model.layers.1"]


def kept_shapes(model: PeftModel, use_reentrant: bool | None) -> list[tuple[int, ...]]:
    """Shapes of the tensors that autograd keeps between forward and backward."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    records: list[ForwardRecord] = []
    with (
        checkpointing(model.train(), use_reentrant),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        SteeringMonitor(model, records.append),
    ):
        logits = model(input_ids=token_ids(2, 5), use_cache=False).logits
        loss = logits.square().mean() + SparsityPenalty(model)(records[0])
    loss.backward()
    return [tuple(tensor.shape) for tensor in kept.values()]


@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "jumprelu"])
def test_checkpointing_keeps_nothing_as_wide_as_the_sae(activation: str) -> None:
    settings = {"l0_coeff": 0.4} if activation == "jumprelu" else {}
    wide = (2, 5, D_SAE)
    plain = kept_shapes(double_model(activation=activation, **settings), None)
    assert sum(shape == wide for shape in plain) >= 1, "the test must see what is kept"
    for use_reentrant in (False, True):
        kept = kept_shapes(double_model(activation=activation, **settings), use_reentrant)
        assert wide not in kept


def test_checkpointing_leaves_an_edited_step_as_it_was() -> None:
    """What is recomputed in the backward pass is the edited step, whose block is over by then."""
    results = []
    for use_reentrant in (None, False):
        model = double_model().train()
        with checkpointing(model, use_reentrant):
            layer = only_layer(model)
            layer.edits.append(lambda v, sae: v * 0.5)
            loss = model(input_ids=token_ids(2, 5), use_cache=False).logits.square().mean()
            layer.edits.clear()
            loss.backward()
        results.append((loss.detach(), {"weight": layer.fsrl_adapter["default"].weight.grad}))
    assert_same(results[1], results[0], rtol=1e-12)


MLP = {"target_modules": ["layers.1.mlp"], "sae": tiny_sae(metadata={}, dtype="float64")}


def test_steering_inside_a_checkpoint() -> None:
    """At an MLP the hook is recomputed with its decoder layer."""
    expected = penalized_step(fsrl_model(tiny_model().double(), l1_coeff=0.7, **MLP))
    model = fsrl_model(tiny_model().double(), l1_coeff=0.7, **MLP)
    with checkpointing(model, False):
        for _ in range(3):
            assert_same(penalized_step(model), expected, rtol=1e-12)


def test_steering_inside_a_reentrant_checkpoint_is_refused(tmp_path: Path) -> None:
    model = fsrl_model(tiny_model().double(), l1_coeff=0.7, **MLP)
    settings = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp' lies inside.*'model.layers.1'"):
        simpo_trainer(model, tmp_path, **settings)
    assert simpo_trainer(double_model(), tmp_path, **settings) is not None
    # Switched on behind the trainer's back.
    with (
        checkpointing(model, True),
        pytest.raises(RuntimeError, match=r"at 'model.layers.1.mlp' is detached.*reentrant"),
    ):
        penalized_step(model)


def test_bf16_autocast_is_close_and_the_adapter_stays_wide(tmp_path: Path) -> None:
    steps = {}
    for bf16 in (False, True):
        model = fsrl_model(l1_coeff=0.7)
        trainer = simpo_trainer(model, tmp_path, bf16=bf16, per_device_train_batch_size=4)
        batch = next(iter(trainer.get_train_dataloader()))
        with trainer.accelerator.autocast():
            steps[bf16] = step(trainer, batch)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        trainer.args.max_steps = 2
        trainer.train()
    assert (steps[True][0] - steps[False][0]).abs() / steps[False][0] < 2e-2
    for name, gradient in steps[False][1].items():
        apart = (steps[True][1][name] - gradient).norm() / gradient.norm()
        assert 1e-6 < apart < 5e-2, f"{name}: 1e-6 would mean that autocast was not on"


def test_fp16_with_a_loss_scaler(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("transformers has a loss scaler for fp16 on accelerators only")
    gradients = {}
    for fp16 in (False, True):
        model = fsrl_model(l1_coeff=0.7, penalty_warmup_ratio=0.0)
        settings = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 1, "use_cpu": False}
        trainer = simpo_trainer(model, tmp_path, fp16=fp16, **settings)
        before = only_layer(model).fsrl_adapter["default"].weight.detach().cpu().clone()
        trainer.train()
        after = only_layer(model).fsrl_adapter["default"].weight.detach().cpu()
        gradients[fp16] = before - after
    apart = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    assert apart < 2e-2


def test_a_wide_adapter_on_a_narrow_base() -> None:
    """The penalty of a float32 adapter is exact for what a bfloat16 base gives it."""
    model = fsrl_model(tiny_model().to(torch.bfloat16), l1_coeff=0.7).train()
    layer = only_layer(model)
    adapter, sae = layer.fsrl_adapter["default"], layer.fsrl_sae["default"]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    states: list[Tensor] = []
    records: list[ForwardRecord] = []
    with (
        observe(model, lambda event: states.append(event.hidden_states)),
        SteeringMonitor(model, records.append),
    ):
        logits = model(input_ids=token_ids(2, 5)).logits
    assert logits.dtype == states[0].dtype == torch.bfloat16
    penalty = SparsityPenalty(model)(records[0])
    penalty.backward()
    weight = adapter.weight.detach().requires_grad_()
    u = sae.process_in(states[0].detach()).float() @ weight.T + adapter.bias.detach()
    v, _ = naive_vector(u, adapter.threshold.detach(), "soft_threshold", 0.0)
    expected = 0.7 * v.abs().sum() / 10
    expected.backward()
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(adapter.weight.grad, weight.grad)
