"""How the penalty's weight moves, what is logged about it, and the thresholds' optimizer group."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from helpers import (
    SIMPO,
    TRAINING,
    fsrl_model,
    only_layer,
    tiny_preferences,
    tiny_sae,
    tiny_tokenizer,
)
from peft_fsrl import FSRLConfig, with_fsrl
from peft_fsrl.steering import SteeringMonitor
from peft_fsrl.training import bound_gains
from peft_fsrl.training.schedule import PenaltySchedule
from peft_fsrl.training.support import require_support

COMMON = {**TRAINING, "per_device_train_batch_size": 4}


def trainer_of(
    model: nn.Module, directory: Path, dpo: bool = False, extra: Any = None, **settings: Any
) -> Any:
    trainer_class, args_class, own = (
        (DPOTrainer, DPOConfig, {}) if dpo else (CPOTrainer, CPOConfig, SIMPO)
    )
    return with_fsrl(trainer_class)(
        model,
        args=args_class(str(directory), **{**COMMON, **own, **settings}),
        train_dataset=tiny_preferences(4),
        processing_class=tiny_tokenizer(),
        **(extra or {}),
    )


def history(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_the_penalty_grows_over_the_first_steps(tmp_path: Path) -> None:
    model = fsrl_model(l1_coeff=0.8, penalty_warmup_ratio=0.5)
    trainer = trainer_of(model, tmp_path, learning_rate=0.0, max_steps=8)
    trainer.train()
    # Nothing moves at a learning rate of zero, so that all steps are alike but for the weight.
    expected = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert history(trainer, "fsrl/l1_coeff") == pytest.approx([0.8 * share for share in expected])
    penalties = history(trainer, "fsrl/penalty")
    assert penalties[-1] > 0.1
    assert [p / penalties[-1] for p in penalties] == pytest.approx(expected, rel=1e-5)


def test_without_a_schedule_the_coefficient_is_not_logged(tmp_path: Path) -> None:
    trainer = trainer_of(fsrl_model(), tmp_path, max_steps=1)
    trainer.train()
    assert history(trainer, "fsrl/penalty")
    assert not history(trainer, "fsrl/l1_coeff")


def test_the_controller_by_hand() -> None:
    """Two features too many, steady, then a fall: pull, smoothing, damping, limit."""
    model = fsrl_model(target_l0=4.0, l1_coeff=0.5)
    config, state = model.peft_config["default"], SimpleNamespace(global_step=1, max_steps=10)
    schedule = PenaltySchedule()
    log_factor, smooth = 0.0, None
    for l0 in (6.0, 6.0, 5.0, 0.0, 4e3):
        # In two micro-batches of unequal size.
        schedule.observe("default", torch.tensor(l0 * 3), torch.tensor(3.0))
        schedule.observe("default", torch.tensor(l0 * 7), torch.tensor(7.0))
        schedule.on_step_end(None, state, None, model=model)
        now = math.log(max(l0, 4e-3))
        before = now if smooth is None else smooth
        smooth = 0.9 * before + 0.1 * now
        move = 0.05 * (smooth - math.log(4)) + 4.0 * (smooth - before)
        log_factor += max(-0.1, min(0.1, move))
        assert schedule.scale("default", config, state) == pytest.approx(math.exp(log_factor))
    assert schedule.scale("other", FSRLConfig(layer=0, sae="a/b"), state) == 1.0


def test_a_target_sparsity_is_kept_to(tmp_path: Path) -> None:
    """A coefficient that is too large silences features, unless it may move."""
    reached = {}
    for target in (None, 6.0):
        model = fsrl_model(l1_coeff=0.3, target_l0=target)
        trainer = trainer_of(model, tmp_path, learning_rate=5e-3, max_steps=60)
        trainer.train()
        reached[target] = sum(history(trainer, "fsrl/l0")[-10:]) / 10
    assert reached[None] < 3.0
    assert reached[6.0] == pytest.approx(6.0, rel=0.3)
    coefficients = history(trainer, "fsrl/l1_coeff")
    assert coefficients[-1] < 0.5 * coefficients[0]


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(restore: bool, tmp_path: Path) -> None:
    settings = {
        "learning_rate": 1e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "restore_callback_states_from_checkpoint": restore,
    }
    results = []
    for name in ("whole", "again"):
        model = fsrl_model(l1_coeff=0.3, target_l0=3.0, penalty_warmup_ratio=0.3)
        trainer = trainer_of(model, tmp_path / "whole", **settings)
        checkpoint = None if name == "whole" else str(tmp_path / "whole" / "checkpoint-4")
        trainer.train(resume_from_checkpoint=checkpoint)
        parameters = only_layer(model).fsrl_adapter["default"].state_dict()
        results.append((parameters, history(trainer, "fsrl/l1_coeff")))
    (whole, coefficients), (again, resumed) = results
    assert len(coefficients) == len(resumed) == 6, "four of them were read from the checkpoint"
    assert coefficients == resumed
    assert len(set(coefficients)) == 6
    for name, value in whole.items():
        assert torch.equal(again[name], value), name


def test_each_evaluation_has_its_own_prefix(tmp_path: Path) -> None:
    sets = {"short": tiny_preferences(2), "long": tiny_preferences(6, seed=3)}
    trainer = trainer_of(
        fsrl_model(),
        tmp_path,
        dpo=True,
        extra={"eval_dataset": sets},
        prediction_loss_only=True,
    )
    metrics = trainer.evaluate()
    for name in sets:
        records: list[Any] = []
        with SteeringMonitor(trainer.model, records.append):
            alone = trainer.evaluate(trainer.eval_dataset[name], metric_key_prefix="mine")
        assert metrics[f"eval_{name}_fsrl/l0"] == alone["mine_fsrl/l0"]
        steered = [r for r in records if r.tokens[0].adapter_name == "default"]
        total = sum(r.tokens[0].l0[r.mask > 0].sum().item() for r in steered)
        expected = total / sum(r.mask.sum().item() for r in steered)
        assert alone["mine_fsrl/l0"] == pytest.approx(expected)
    assert metrics["eval_short_fsrl/l0"] != metrics["eval_long_fsrl/l0"]
    assert {n for n in metrics if "fsrl" in n} == {
        f"eval_{name}_fsrl/{kind}" for name in sets for kind in ("l0", "l1", "l2", "nonfinite")
    }
    predicted = trainer.predict(trainer.eval_dataset["long"]).metrics
    assert predicted["test_fsrl/l1"] == metrics["eval_long_fsrl/l1"]
    logged = [row for row in trainer.state.log_history if "eval_long_fsrl/l0" in row]
    assert len(logged) == 1


def test_an_adapter_that_comes_later_is_penalized(tmp_path: Path) -> None:
    model = fsrl_model(l1_coeff=0.7)
    trainer = trainer_of(model, tmp_path, max_steps=2, learning_rate=0.0)
    later = FSRLConfig(layer=1, sae=tiny_sae(), l1_coeff=0.2, init_scale=0.5)
    model.add_adapter("later", later)
    model.set_adapter("later")
    trainer.train()
    [first, second] = history(trainer, "fsrl/penalty")
    assert second == pytest.approx(first, rel=1e-5)
    assert first > 0.1
    model.peft_config["later"].l1_coeff = 0.4
    again = trainer_of(model, tmp_path, max_steps=1, learning_rate=0.0)
    again.train()
    assert history(again, "fsrl/penalty")[0] == pytest.approx(2 * first, rel=1e-5)


def test_a_threshold_below_zero_acts_as_zero_and_comes_back(tmp_path: Path) -> None:
    """Nothing but the formula keeps thresholds valid: no projection, no optimizer's hook."""
    model = fsrl_model(l1_coeff=1.0)
    adapter = only_layer(model).fsrl_adapter["default"]
    logits = {}
    for value in (0.0, -0.01):
        with torch.no_grad():
            adapter.threshold.fill_(value)
            logits[value] = model(torch.arange(3, 9)[None]).logits
    assert torch.equal(logits[0.0], logits[-0.01])
    trainer = trainer_of(model, tmp_path, learning_rate=5e-3, max_steps=6)
    trainer.train()
    assert (adapter.threshold > 0).sum() > 20, "the penalty raises them"


def groups(optimizer: Any) -> list[tuple[float, float, int]]:
    return sorted((g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups)


def own_optimizer(model: PeftModel) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=0.02, betas=(0.5, 0.6), weight_decay=0.3)


def test_a_users_optimizer_keeps_its_learning_rate(tmp_path: Path) -> None:
    model = fsrl_model(threshold_lr_multiplier=0.25)
    optimizer = own_optimizer(model)
    trainer = trainer_of(
        model, tmp_path, extra={"optimizers": (optimizer, None)}, learning_rate=7.0, max_steps=1
    )
    trainer.train()
    assert groups(optimizer) == [(0.005, 0.3, 1), (0.02, 0.3, 2)]
    assert all(group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)


@pytest.mark.parametrize("multiplier", [1.0, 10.0])
def test_training_goes_on_with_the_groups_that_it_has(multiplier: float, tmp_path: Path) -> None:
    model = fsrl_model(threshold_lr_multiplier=multiplier)
    settings = {"learning_rate": 0.01, "weight_decay": 0.3, "max_steps": 2}
    trainer = trainer_of(model, tmp_path, **settings)
    trainer.train()
    expected = sorted([(0.01, 0.3, 1), (0.01, 0.0, 1), (0.01 * multiplier, 0.0, 1)])
    assert groups(trainer.optimizer) == expected
    for _ in range(2):
        trainer.train()
        assert groups(trainer.optimizer) == expected


def test_a_second_trainer_finds_the_optimizer_as_the_first_left_it(tmp_path: Path) -> None:
    model = fsrl_model(threshold_lr_multiplier=0.25)
    optimizer = own_optimizer(model)
    for _ in range(2):
        extra = {"optimizers": (optimizer, None)}
        trainer_of(model, tmp_path, extra=extra, max_steps=1).train()
        assert groups(optimizer) == [(0.005, 0.3, 1), (0.02, 0.3, 2)]


def test_an_optimizer_that_has_had_a_scheduler_gets_the_multiplier(tmp_path: Path) -> None:
    model = fsrl_model(threshold_lr_multiplier=0.25)
    optimizer = own_optimizer(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer_of(model, tmp_path, extra={"optimizers": (optimizer, None)}, max_steps=1).train()
    assert groups(optimizer) == [(0.005, 0.3, 1), (0.02, 0.3, 2)]


def test_a_users_groups_are_left_alone_without_a_multiplier(tmp_path: Path) -> None:
    model = fsrl_model()
    optimizer = own_optimizer(model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=99)
    trainer = trainer_of(model, tmp_path, extra={"optimizers": (optimizer, scheduler)}, max_steps=3)
    trainer.train()
    assert groups(optimizer) == [(0.01, 0.3, 3)]


def test_a_scheduler_for_other_groups_is_refused(tmp_path: Path) -> None:
    model = fsrl_model(threshold_lr_multiplier=0.25)
    optimizer = own_optimizer(model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = trainer_of(model, tmp_path, extra={"optimizers": (optimizer, scheduler)}, max_steps=1)
    with pytest.raises(ValueError, match=r"threshold_lr_multiplier=0.25 needs an optimizer group"):
        trainer.train()


def trained_gains(directory: Path, steps: int, **settings: Any) -> torch.Tensor:
    sae = tiny_sae("jumprelu")
    model = fsrl_model(sae=sae, activation="gain", l1_coeff=0.0, **settings)
    trainer_of(model, directory, learning_rate=0.05, max_steps=steps, optim="sgd").train()
    return only_layer(model).fsrl_adapter["default"].gain.detach()


def test_gains_are_bounded_after_every_step(tmp_path: Path) -> None:
    free = trained_gains(tmp_path, 1)
    bound = float(free[free < 0].median())
    bounded = trained_gains(tmp_path, 1, min_gain=bound)
    expected = torch.tensor([max(bound, value) for value in free.tolist()])
    torch.testing.assert_close(bounded, expected, rtol=0, atol=0)
    assert trained_gains(tmp_path, 3, min_gain=bound).min() == torch.tensor(bound)


def test_a_bound_is_of_its_own_adapter() -> None:
    sae = tiny_sae("jumprelu")
    model = fsrl_model(sae=sae, activation="gain", min_gain=-0.5)
    for name, settings in (("free", {"activation": "gain"}), ("other", {})):
        model.add_adapter(name, FSRLConfig(layer=1, sae=sae, **settings))
    adapters = only_layer(model).fsrl_adapter
    start = torch.linspace(-2, 1, sae.cfg.d_sae)
    for name in ("default", "free"):
        adapters[name].gain.data.copy_(start)
    bound_gains(model)
    expected = torch.tensor([max(-0.5, value) for value in start.tolist()])
    assert torch.equal(adapters["default"].gain, expected)
    assert torch.equal(adapters["free"].gain, start)


def test_a_bound_is_refused_where_it_would_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fsrl_model(sae=tiny_sae("jumprelu"), activation="gain", min_gain=-0.5)
    trainer = trainer_of(model, tmp_path)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match=r"DeepSpeed.*`min_gain` cannot bound.*DDP or FSDP2"):
        require_support(trainer)


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "more than all": ({"penalty_warmup_ratio": 1.5}, ValueError, "at most 1; got 1.5"),
    "less than none": ({"penalty_warmup_ratio": -0.1}, ValueError, "not negative"),
    "no features": ({"target_l0": 0.0}, ValueError, "`target_l0` must be finite and positive"),
    "a word": ({"target_l0": "few"}, TypeError, "`target_l0` must be a number"),
    "no start": ({"target_l0": 5.0, "l1_coeff": 0.0}, ValueError, "must not be zero"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_schedules_that_make_no_sense(mistake: str) -> None:
    settings, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        FSRLConfig(layer=1, sae="release/id", **settings)
