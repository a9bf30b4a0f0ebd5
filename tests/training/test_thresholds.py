"""How the penalty's weight and the thresholds move, what is logged, the optimizer's groups."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from helpers import (
    SIMPO,
    TRAINING,
    fsrl_model,
    load_example,
    only_layer,
    tiny_preferences,
    tiny_sae,
    tiny_tokenizer,
)
from peft_fsrl import FSRLConfig, with_fsrl
from peft_fsrl.steering import ForwardRecord, SteeringMonitor, observe
from peft_fsrl.training import bound_gains
from peft_fsrl.training.support import require_support
from peft_fsrl.training.thresholds import _real_tokens, hold_target_l0

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


ALONE = Accelerator(cpu=True)
NAMES = {"soft_threshold": "threshold", "relu": "bias", "jumprelu": "log_threshold"}


def step_of(global_step: int, max_steps: int = 40) -> Any:
    return SimpleNamespace(global_step=global_step, max_steps=max_steps)


def reach(
    model: nn.Module, ids: Tensor, mask: Tensor, step: int = 40, share: float = 1.0
) -> ForwardRecord:
    """One training pass that holds to the target: what was steered in it."""
    records: list[ForwardRecord] = []
    model.train()
    monitor = SteeringMonitor(model, records.append)
    with monitor, hold_target_l0(model, monitor, ALONE, step_of(step), share):
        model(input_ids=ids, attention_mask=mask).logits.sum().backward()
    model.eval()
    [record] = records
    return record


def tokens_differ(model: nn.Module) -> Any:
    """The adapter, made to read more of what differs between tokens than of its bias."""
    adapter = only_layer(model).fsrl_adapter["default"]
    adapter.weight.data.mul_(50)
    return adapter


def two_rows() -> tuple[Tensor, Tensor]:
    ids = torch.arange(3, 27).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


def mean_l0(record: ForwardRecord, layer: int = 0) -> float:
    return record.tokens[layer].l0[record.mask > 0].mean().item()


@pytest.mark.parametrize(
    ("activation", "wanted"),
    [*((name, 2.0) for name in NAMES), ("soft_threshold", 21.0), ("relu", 21.0)],
)
def test_a_common_amount_found_by_a_loop(activation: str, wanted: float) -> None:
    """Among all amounts at which some feature of some token begins to be steered."""
    settings = {"jumprelu_bandwidth": 0.5} if activation == "jumprelu" else {}
    model = fsrl_model(activation=activation, target_l0=wanted, **settings)
    few = wanted == 2.0
    adapter = tokens_differ(model) if few else only_layer(model).fsrl_adapter["default"]
    before = {name: value.detach().clone() for name, value in adapter.named_parameters()}
    ids, mask = two_rows()
    events: list[Any] = []
    with observe(model, events.append), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    real = events[0].hidden_states[mask > 0]
    u = events[0].sae.process_in(real) @ before["weight"].T + before["bias"]
    amounts = []
    for row in u.tolist():
        for k, value in enumerate(row):
            if activation == "relu":
                amounts.append(value)
            elif activation == "soft_threshold":
                amounts.append(abs(value) - before["threshold"][k].item())
            elif value > 0:
                amounts.append(math.log(value) - before["log_threshold"][k].item())
    amounts.sort(reverse=True)
    n = int(wanted * len(u))
    amount = (amounts[n - 1] + amounts[n]) / 2

    record = reach(model, ids, mask)
    assert mean_l0(record) == pytest.approx(n / len(u))
    moved = NAMES[activation]
    expected = before[moved] + (-amount if activation == "relu" else amount)
    if activation == "soft_threshold":
        expected = expected.clamp(min=0)
        assert (expected == 0).any() == (not few)
    for name, value in before.items():
        wished = expected if name == moved else value
        torch.testing.assert_close(getattr(adapter, name).detach(), wished)


def test_padding_and_an_evaluation_move_nothing() -> None:
    ids, mask = two_rows()
    thresholds = []
    for left, right in ((0, 0), (4, 0), (0, 4)):
        model = fsrl_model(target_l0=3.0)
        adapter = tokens_differ(model)
        start = adapter.threshold.detach().clone()
        monitor = SteeringMonitor(model, lambda record: None)
        with monitor, hold_target_l0(model, monitor, ALONE, step_of(9)):
            model(ids)
            with torch.no_grad():
                model.train()(ids)
        assert torch.equal(adapter.threshold, start)
        padded = F.pad(ids, (left, right), value=7), F.pad(mask, (left, right))
        reach(model, *padded)
        assert not torch.equal(adapter.threshold, start)
        thresholds.append(adapter.threshold.detach())
    for other in thresholds[1:]:
        torch.testing.assert_close(other, thresholds[0])


def test_each_layer_and_some_features_reach_the_target() -> None:
    saes = {"0": tiny_sae(metadata={}), "2": tiny_sae(metadata={}, seed=3)}
    model = fsrl_model(sae=saes, layer=[0, 2], exclude_features=[1, 5], target_l0=4.0)
    record = reach(model, *two_rows())
    assert [mean_l0(record, layer) for layer in (0, 1)] == pytest.approx([4.0, 4.0], abs=0.03)


def test_a_number_of_features_falls_to_the_target_and_does_not_rise() -> None:
    """In four of forty steps, by the same factor each, from all of 24 features to 3."""
    ids, mask = two_rows()
    counts = []
    for step in (1, 2, 4):
        model = fsrl_model(target_l0=3.0)
        only_layer(model).fsrl_adapter["default"].threshold.data.zero_()
        counts.append(mean_l0(reach(model, ids, mask, step)))
    factor = (3 / 24) ** 0.25
    assert counts == pytest.approx([24 * factor, 24 * factor**2, 3.0], rel=0.01)
    model = fsrl_model(target_l0=3.0)
    adapter = only_layer(model).fsrl_adapter["default"]
    start = adapter.threshold.detach().clone()
    reach(model, ids, mask, step=0)
    assert torch.equal(adapter.threshold, start)


def test_a_share_of_the_way_for_one_of_several_batches() -> None:
    moves = []
    for share in (1.0, 0.4):
        model = fsrl_model(activation="relu", target_l0=3.0)
        adapter = only_layer(model).fsrl_adapter["default"]
        start = adapter.bias.detach().clone()
        reach(model, *two_rows(), share=share)
        moves.append(adapter.bias.detach() - start)
    torch.testing.assert_close(moves[1], 0.4 * moves[0])


def test_what_does_not_train_stays() -> None:
    model = fsrl_model(target_l0=3.0)
    adapter = only_layer(model).fsrl_adapter["default"]
    adapter.requires_grad_(False)
    start = adapter.threshold.detach().clone()
    model.enable_input_require_grads()
    reach(model, *two_rows())
    assert torch.equal(adapter.threshold, start)


def test_many_tokens_are_drawn_anew_each_step() -> None:
    x = torch.arange(2000.0).view(2, 1000, 1)
    drawn = [_real_tokens(x, None, seed=seed).flatten() for seed in (0, 0, 1)]
    assert len(drawn[0]) == len(drawn[0].unique()) == 512
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    # Rows of one length would alias with even steps: all positions of a row are met alike.
    assert drawn[0].remainder(10).float().std() == pytest.approx(2.87, abs=0.15)


def test_the_organism_holds_the_target_from_a_tenth_of_the_run_on(tmp_path: Path) -> None:
    """With larger activations, and nothing set for them, the run is the same one."""
    example = load_example("target_l0")
    options = ["--steps", "30", "--batch_size", "4", "--test_pairs", "4", "--target_l0", "6"]
    args = example.parse(options)
    found = {}
    for name in ("organism", "organism x 16"):
        found[name] = example.run(args, name, tmp_path / name)
        for l0 in found[name]["l0"][3:]:
            assert l0 == pytest.approx(6.0, rel=0.2)
    assert "from 1/10 on" in example.render(found)
    plain, scaled = found.values()
    assert plain["after"] < plain["before"] - 0.05
    assert scaled["after"] == pytest.approx(plain["after"], abs=0.01)


def test_sharded_thresholds_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(fsrl_model(target_l0=3.0), tmp_path)
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        with patch.object(trainer, name, True), pytest.raises(ValueError, match="with DDP"):
            require_support(trainer)


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
        results.append((parameters, history(trainer, "fsrl/l1_coeff"), history(trainer, "fsrl/l0")))
    (whole, coefficients, l0), (again, resumed, again_l0) = results
    assert len(coefficients) == len(resumed) == 6, "four of them were read from the checkpoint"
    assert coefficients == resumed
    assert l0 == again_l0
    assert l0[1:] == pytest.approx([3.0] * 5, rel=0.05)
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
    "no thresholds": ({"target_l0": 5.0, "activation": "gain"}, ValueError, "'gain' has none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_schedules_that_make_no_sense(mistake: str) -> None:
    settings, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        FSRLConfig(layer=1, sae="release/id", **settings)
