"""The penalty in real trainers: one optimizer step against gradients derived in loops."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from helpers import (
    DESCENT,
    SIMPO,
    fsrl_model,
    naively_steered,
    only_layer,
    randomize_adapter,
    tiny_model,
    tiny_preferences,
    tiny_sae,
    tiny_tokenizer,
    token_ids,
)
from peft_fsrl import FSRLConfig
from peft_fsrl.steering import SteeringMonitor
from peft_fsrl.training.trainer import FSRLTrainerMixin, with_fsrl

BETA, GAMMA, LR = 10.0, 5.0, 0.5
COMMON = {**DESCENT, "learning_rate": LR, "max_steps": 1, "remove_unused_columns": False}


class Reporter(TrainerCallback):
    """What a logging integration is given."""

    def __init__(self) -> None:
        self.logs: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.update(logs)


def cpo_trainer(
    model: PeftModel, directory: Path, batch_size: int = 4, accumulation: int = 1, **settings: Any
) -> tuple[Any, Reporter]:
    rows, reporter = tiny_preferences(4), Reporter()
    args = CPOConfig(
        str(directory),
        max_length=64,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=accumulation,
        **{**COMMON, **SIMPO, **settings},
    )
    trainer = with_fsrl(CPOTrainer)(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        callbacks=[reporter],
    )
    return trainer, reporter


def snapshot(model: PeftModel) -> dict[str, Tensor]:
    adapter = only_layer(model).fsrl_adapter["default"]
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def sequences(trainer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of every chosen and then every rejected text, without any padding."""
    found = []
    for kind in ("chosen", "rejected"):
        for row in trainer.train_dataset:
            labels = row[f"{kind}_labels"]
            found.append((row[f"{kind}_input_ids"], labels))
    return found


class Naive:
    """The objective of one step, sequence by sequence, token by token."""

    def __init__(self, model: PeftModel, texts: list[tuple[list[int], list[int]]]) -> None:
        layer = only_layer(model)
        config = model.peft_config["default"]
        dtype = layer.fsrl_adapter["default"].weight.dtype
        base = tiny_model().to(dtype)
        base.requires_grad_(False)
        self.parameters = {n: p.requires_grad_() for n, p in snapshot(model).items()}
        self.log_probabilities, l1_means, l2_means, gate_means = [], [], [], []
        self.tokens: dict[str, list[float]] = {"l0": [], "l1": [], "l2": []}
        sae = tiny_sae(dtype=str(dtype).removeprefix("torch."))
        for ids, labels in texts:
            with naively_steered(base, layer, sae, self.parameters) as steered:
                logits = base(torch.tensor([ids])).logits[0]
            [(_, v, gate)] = steered
            terms = [
                logits[t].log_softmax(-1)[labels[t + 1]]
                for t in range(len(ids) - 1)
                if labels[t + 1] != -100
            ]
            self.log_probabilities.append(terms)
            norms = [v[0, t].abs().sum() for t in range(len(ids))]
            l1_means.append(sum(norms) / len(ids))
            l2_means.append(sum((v[0, t] ** 2).sum() for t in range(len(ids))) / len(ids))
            if gate is not None:
                gate_means.append(sum(gate[0, t].sum() for t in range(len(ids))) / len(ids))
            self.tokens["l1"] += [norm.item() for norm in norms]
            self.tokens["l0"] += [float((v[0, t] != 0).sum()) for t in range(len(ids))]
            self.tokens["l2"] += [v[0, t].norm().item() for t in range(len(ids))]
        self.penalty = config.l1_coeff * sum(l1_means) / len(l1_means)
        self.penalty = self.penalty + config.l2_coeff * sum(l2_means) / len(l2_means)
        if gate_means:
            self.penalty = self.penalty + config.l0_coeff * sum(gate_means) / len(gate_means)

    def simpo(self) -> Tensor:
        means = [sum(terms) / len(terms) for terms in self.log_probabilities]
        pairs = len(means) // 2
        losses = [
            -F.logsigmoid(BETA * (means[row] - means[pairs + row]) - GAMMA) for row in range(pairs)
        ]
        return sum(losses) / pairs

    def cross_entropy(self) -> Tensor:
        terms = [term for sequence in self.log_probabilities for term in sequence]
        return -sum(terms) / len(terms)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        names = list(self.parameters)
        found = torch.autograd.grad(loss, [self.parameters[n] for n in names], retain_graph=True)
        return dict(zip(names, found, strict=True))

    def mean(self, name: str) -> float:
        return sum(self.tokens[name]) / len(self.tokens[name])


def assert_stepped(
    model: PeftModel, before: dict[str, Tensor], gradients: dict[str, Tensor], **lrs: float
) -> None:
    """Every parameter moved by the negative gradient times its learning rate."""
    for name, after in snapshot(model).items():
        assert gradients[name].abs().max() > 1e-3, f"{name}: the test needs a gradient"
        moved = (before[name] - after) / lrs.get(name, LR)
        torch.testing.assert_close(moved, gradients[name], rtol=1e-5, atol=1e-8, msg=name)


def double_model(**settings: Any) -> PeftModel:
    return fsrl_model(tiny_model().double(), sae=tiny_sae(dtype="float64"), **settings)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("l2_coeff", [0.0, 0.6])
def test_simpo_step_equals_the_gradient_by_hand(
    batch_size: int, accumulation: int, l2_coeff: float, tmp_path: Path
) -> None:
    model = double_model(l1_coeff=0.7 - l2_coeff, l2_coeff=l2_coeff)
    trainer, reporter = cpo_trainer(model, tmp_path, batch_size, accumulation)
    naive = Naive(model, sequences(trainer))
    assert len({len(ids) for ids, _ in sequences(trainer)}) > 1, "the test needs padding"
    before = snapshot(model)
    gradients = naive.gradients(naive.simpo() + naive.penalty)
    penalty_alone = naive.gradients(naive.penalty)
    assert all(g.abs().max() > 0 for g in penalty_alone.values())
    trainer.train()
    assert_stepped(model, before, gradients)
    assert reporter.logs["loss"] == pytest.approx((naive.simpo() + naive.penalty).item(), rel=1e-4)
    assert reporter.logs["fsrl/penalty"] == pytest.approx(naive.penalty.item(), rel=1e-5)
    for name in ("l0", "l1", "l2"):
        assert reporter.logs[f"fsrl/{name}"] == pytest.approx(naive.mean(name), rel=1e-5)


def test_evaluation_is_the_preference_loss_alone(tmp_path: Path) -> None:
    metrics = {}
    for coefficient in (0.0, 5.0):
        model = double_model(l1_coeff=coefficient)
        trainer, reporter = cpo_trainer(model, tmp_path)
        metrics[coefficient] = trainer.evaluate()
    assert metrics[0.0]["eval_loss"] == metrics[5.0]["eval_loss"]
    naive = Naive(model, sequences(trainer))
    # Batches of three and one: the trainer's own mean over samples.
    assert metrics[5.0]["eval_loss"] == pytest.approx(naive.simpo().item(), rel=1e-5)
    for name in ("l0", "l1", "l2"):
        expected = pytest.approx(naive.mean(name), rel=1e-5)
        assert metrics[5.0][f"eval_fsrl/{name}"] == expected
        assert reporter.logs[f"eval_fsrl/{name}"] == expected
    assert "eval_fsrl/penalty" not in reporter.logs
    assert "fsrl/l0" not in reporter.logs


def test_jumprelu_with_both_coefficients(tmp_path: Path) -> None:
    model = double_model(activation="jumprelu", jumprelu_bandwidth=0.4, l1_coeff=0.3, l0_coeff=0.9)
    trainer, reporter = cpo_trainer(model, tmp_path, batch_size=2, accumulation=2)
    naive = Naive(model, sequences(trainer))
    before, gradients = snapshot(model), naive.gradients(naive.simpo() + naive.penalty)
    trainer.train()
    assert_stepped(model, before, gradients)
    assert reporter.logs["fsrl/penalty"] == pytest.approx(naive.penalty.item(), rel=1e-5)


def test_gains_alone_are_trained(tmp_path: Path) -> None:
    model = double_model(activation="gain", l1_coeff=0.7, l2_coeff=0.2)
    encoder = only_layer(model).fsrl_adapter["default"].weight.clone()
    trainer, reporter = cpo_trainer(model, tmp_path, batch_size=2, accumulation=2)
    naive = Naive(model, sequences(trainer))
    before, gradients = snapshot(model), naive.gradients(naive.simpo() + naive.penalty)
    assert set(before) == {"gain"}
    trainer.train()
    assert_stepped(model, before, gradients)
    assert reporter.logs["fsrl/penalty"] == pytest.approx(naive.penalty.item(), rel=1e-5)
    assert torch.equal(only_layer(model).fsrl_adapter["default"].weight, encoder)


def test_token_reduction_within_a_batch(tmp_path: Path) -> None:
    model = double_model(l1_coeff=0.7, penalty_reduction="token")
    trainer, _ = cpo_trainer(model, tmp_path)
    naive = Naive(model, sequences(trainer))
    before = snapshot(model)
    with_tokens = 0.7 * token_mean_l1(model, sequences(trainer), naive)
    gradients = naive.gradients(naive.simpo() + with_tokens)
    trainer.train()
    assert_stepped(model, before, gradients)


def token_mean_l1(
    model: PeftModel, texts: list[tuple[list[int], list[int]]], naive: Naive
) -> Tensor:
    base, norms = tiny_model().double().requires_grad_(False), []
    for ids, _ in texts:
        sae = tiny_sae(dtype="float64")
        with naively_steered(base, only_layer(model), sae, naive.parameters) as steered:
            base(torch.tensor([ids]))
        norms += [steered[0][1][0, t].abs().sum() for t in range(len(ids))]
    return sum(norms) / len(norms)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_step(use_reentrant: bool, tmp_path: Path) -> None:
    model = double_model(l1_coeff=0.7)
    trainer, reporter = cpo_trainer(
        model,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    naive = Naive(model, sequences(trainer))
    before, gradients = snapshot(model), naive.gradients(naive.simpo() + naive.penalty)
    # Older releases of transformers checkpoint `__call__`, and with it the hook that steers.
    if use_reentrant and "__call__" in vars(GradientCheckpointingLayer):
        with pytest.raises(RuntimeError, match="is detached and would not affect training"):
            trainer.train()
        return
    trainer.train()
    assert_stepped(model, before, gradients)
    assert reporter.logs["fsrl/l0"] == pytest.approx(naive.mean("l0"), rel=1e-5)


def test_thresholds_have_their_own_learning_rate(tmp_path: Path) -> None:
    model = double_model(l1_coeff=0.7, threshold_lr_multiplier=0.25)
    trainer, _ = cpo_trainer(model, tmp_path, weight_decay=0.5)
    naive = Naive(model, sequences(trainer))
    before, gradients = snapshot(model), naive.gradients(naive.simpo() + naive.penalty)
    gradients["weight"] = gradients["weight"] + 0.5 * before["weight"]
    trainer.train()
    assert_stepped(model, before, gradients, threshold=0.25 * LR)
    groups = [
        (g["lr"], g["weight_decay"], len(g["params"])) for g in trainer.optimizer.param_groups
    ]
    assert sorted(groups) == [(0.25 * LR, 0.0, 1), (LR, 0.0, 1), (LR, 0.5, 1)]


def labeled_rows() -> Dataset:
    rows = []
    for row in range(4):
        length = 4 + row
        ids = token_ids(1, length, seed=row)[0].tolist()
        labels = [-100, -100, *ids[2:]]
        padding = 7 - length
        rows.append(
            {
                "input_ids": ids + [0] * padding,
                "attention_mask": [1] * length + [0] * padding,
                "labels": labels + [-100] * padding,
            }
        )
    return Dataset.from_list(rows)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (1, 4)])
def test_plain_trainer(batch_size: int, accumulation: int, tmp_path: Path) -> None:
    model, rows, reporter = double_model(l1_coeff=0.7), labeled_rows(), Reporter()
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **COMMON,
    )
    trainer = with_fsrl(Trainer)(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=[reporter]
    )
    texts = [
        (
            row["input_ids"][: sum(row["attention_mask"])],
            row["labels"][: sum(row["attention_mask"])],
        )
        for row in rows
    ]
    naive = Naive(model, texts)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(naive.cross_entropy().item(), rel=1e-5)
    assert reporter.logs["eval_fsrl/l0"] == pytest.approx(naive.mean("l0"), rel=1e-5)
    before, gradients = snapshot(model), naive.gradients(naive.cross_entropy() + naive.penalty)
    trainer.train()
    assert_stepped(model, before, gradients)
    assert reporter.logs["fsrl/penalty"] == pytest.approx(naive.penalty.item(), rel=1e-5)


def test_training_sparsifies_with_a_penalty(tmp_path: Path) -> None:
    model = fsrl_model(l1_coeff=3.0)
    trainer, _ = cpo_trainer(model, tmp_path, max_steps=12, learning_rate=0.05, optim="adamw_torch")
    trainer.train()
    history = [row for row in trainer.state.log_history if "fsrl/l1" in row]
    assert len(history) == 12
    assert all(math.isfinite(row["loss"]) for row in history)
    assert history[-1]["fsrl/l1"] < 0.5 * history[0]["fsrl/l1"]
    assert history[-1]["fsrl/l0"] < history[0]["fsrl/l0"]


def test_a_trainer_leaves_the_model_as_it_found_it(tmp_path: Path) -> None:
    model = fsrl_model()
    trainer, _ = cpo_trainer(model, tmp_path)
    trainer.train()
    assert only_layer(model).observers == []
    assert all(not isinstance(value, FSRLTrainerMixin) for value in vars(model).values())
    expected = model.eval()(token_ids()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(token_ids()).logits, expected)
    forgotten = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert forgotten() is None


def test_with_fsrl_is_one_class_per_trainer() -> None:
    first = with_fsrl(CPOTrainer)
    assert first is with_fsrl(CPOTrainer) is with_fsrl(first)
    assert first.__name__ == "FSRLCPOTrainer"
    assert issubclass(first, CPOTrainer)
    assert issubclass(first, FSRLTrainerMixin)


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), **COMMON)
    with pytest.raises(ValueError, match="has no FSRL adapter"):
        with_fsrl(Trainer)(model=tiny_model(), args=args, train_dataset=labeled_rows())


def test_the_adapter_is_made_by_the_trainer(tmp_path: Path) -> None:
    base = tiny_model()
    args = CPOConfig(
        str(tmp_path), max_length=64, per_device_train_batch_size=4, **{**COMMON, "max_steps": 1}
    )
    trainer = with_fsrl(CPOTrainer)(
        model=base,
        args=args,
        train_dataset=tiny_preferences(4),
        processing_class=tiny_tokenizer(),
        peft_config=FSRLConfig(layer=1, sae=tiny_sae(), task_type="CAUSAL_LM"),
    )
    assert isinstance(trainer.model, nn.Module)
    trainer.train()
    trained = snapshot(trainer.model)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    for name, value in snapshot(loaded).items():
        assert torch.equal(value, trained[name])


class Sub(with_fsrl(Trainer)):
    """What a user makes of it."""


def plain_trainer(directory: Path, kind: Any = None, **options: Any) -> Any:
    settings = {**COMMON, "per_device_train_batch_size": 2, **options.pop("settings", {})}
    if "model_init" not in options:
        options.setdefault("model", fsrl_model(l1_coeff=0.7))
    return (kind or with_fsrl(Trainer))(
        args=TrainingArguments(str(directory), **settings),
        train_dataset=labeled_rows(),
        **options,
    )


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_a_model_that_is_made_anew_has_its_own_coefficients(tmp_path: Path) -> None:
    """As in a hyperparameter search, whose trials each make a model."""
    coefficients = iter([0.1, 0.1, 0.4, 0.1])
    trainer = plain_trainer(
        tmp_path,
        model_init=lambda: fsrl_model(l1_coeff=next(coefficients)),
        settings={"learning_rate": 0.0, "max_steps": 3},
    )
    penalties = []
    for _ in range(3):
        trainer.train()
        penalties.append(logged(trainer, "fsrl/penalty")[0])
    assert penalties[1] == pytest.approx(4 * penalties[0], rel=1e-5)
    assert penalties[2] == pytest.approx(penalties[0], rel=1e-5)


def test_a_failed_attempt_is_not_in_the_first_figures(tmp_path: Path) -> None:
    """``auto_find_batch_size`` begins anew with half the batch where memory is short."""

    class Short(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and trainer._train_batch_size == 4:
                with torch.no_grad():
                    only_layer(trainer.model).fsrl_adapter["default"].bias.fill_(0.0)
                raise RuntimeError("CUDA out of memory.")

    settings = {
        **{"auto_find_batch_size": True, "per_device_train_batch_size": 4},
        **{"max_steps": 2, "logging_steps": 2, "learning_rate": 0.0},
    }
    trainer = plain_trainer(tmp_path, callbacks=[Short()], settings=settings)
    trainer.train()
    records: list[Any] = []
    with SteeringMonitor(trainer.model, records.append), torch.no_grad():
        for row in labeled_rows():
            ids, mask = (torch.tensor([row[name]]) for name in ("input_ids", "attention_mask"))
            trainer.model(input_ids=ids, attention_mask=mask)
    total = sum(float(r.tokens[0].l1[r.mask > 0].sum()) for r in records)
    expected = total / sum(int(r.mask.sum()) for r in records)
    assert logged(trainer, "fsrl/l1") == [pytest.approx(expected, rel=1e-5)]


def test_a_subclass_has_its_trainers_name(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, Sub)
    trainer.save_model()
    assert "| trainer | Trainer |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"sae": tiny_sae(seed=1)}, "sae fingerprint"),
        ({"features": list(range(1, 24))}, "features="),
        ({"non_negative": False}, "non_negative=False"),
        ({"activation": "relu"}, "activation='relu'"),
    ],
)
def test_a_run_of_another_adapter_is_not_resumed(
    other: dict[str, Any], named: str, tmp_path: Path
) -> None:
    first = {"features": list(range(23))} if "features" in other else {}
    settings = {"save_strategy": "steps", "save_steps": 1}
    plain_trainer(tmp_path, model=fsrl_model(**first), settings=settings).train()
    again = {"max_steps": 2}
    plain_trainer(tmp_path, model=fsrl_model(l1_coeff=9.0, **first), settings=again).train(True)
    trainer = plain_trainer(tmp_path, model=fsrl_model(**other), settings=again)
    before = snapshot(trainer.model)
    with pytest.raises(ValueError, match=rf"checkpoint-1 are of another adapter.*{named}"):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, before[n]) for n, value in snapshot(trainer.model).items())


# Of TRL, that activates checkpoints under their old name there.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("given", ["adapter", "config"])
def test_a_quantized_base_leaves_the_adapter_wide(given: str, tmp_path: Path) -> None:
    """TRL casts what trains to bfloat16 there, in which a threshold does not move at all."""
    base = tiny_model()
    base.is_loaded_in_4bit = True
    config = FSRLConfig(
        layer=1, sae=tiny_sae(), activation="jumprelu", jumprelu_bandwidth=5.0, l1_coeff=0.7
    )
    model = fsrl_model(base, config) if given == "adapter" else base
    before = snapshot(model) if given == "adapter" else {}
    trainer = with_fsrl(DPOTrainer)(
        model,
        args=DPOConfig(
            str(tmp_path),
            **{**COMMON, "gradient_checkpointing": True, "learning_rate": 1e-5, "max_steps": 3},
        ),
        peft_config=config if given == "config" else None,
        train_dataset=tiny_preferences(4),
        processing_class=tiny_tokenizer(),
    )
    start = snapshot(trainer.model)
    assert {value.dtype for value in start.values()} == {torch.float32}
    assert all(torch.equal(value, start[name]) for name, value in before.items())
    randomize_adapter(only_layer(trainer.model))
    start = snapshot(trainer.model)
    trainer.train()
    assert not torch.equal(snapshot(trainer.model)["log_threshold"], start["log_threshold"])
