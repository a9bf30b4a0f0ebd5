"""SimPO twice: on TRL's CPOTrainer and on its DPOTrainer, with the same numbers."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

import peft_fsrl.training.simpo
from helpers import (
    DESCENT,
    fsrl_model,
    only_layer,
    tiny_model,
    tiny_preferences,
    tiny_sae,
    tiny_tokenizer,
)
from peft_fsrl import with_fsrl
from peft_fsrl.training.objectives import simpo_loss
from peft_fsrl.training.simpo import (
    SimPOConfig,
    SimPOTrainer,
    StableSimPOConfig,
    StableSimPOTrainer,
    answer_log_probs,
)

LR = 0.05
SETTINGS = {
    **DESCENT,
    "learning_rate": LR,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "max_length": 64,
}


def test_the_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-1.5, -0.5]).double()
    for row, (c, r) in enumerate(((-1.0, -1.5), (-2.0, -0.5))):
        margin = 10 * (c - r) - 5
        expected = 0.9 * math.log1p(math.exp(-margin)) + 0.1 * math.log1p(math.exp(margin))
        assert simpo_loss(10 * (chosen - rejected), 5.0, 0.1)[row].item() == pytest.approx(expected)


def test_answers_by_loops() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 0, 6]])
    totals, lengths = answer_log_probs(logits, labels)
    for row in range(2):
        terms = [
            logits[row, t - 1].log_softmax(-1)[labels[row, t]].item()
            for t in range(1, 5)
            if labels[row, t] != -100
        ]
        assert lengths[row] == len(terms)
        assert totals[row].item() == pytest.approx(sum(terms))


def tokenizer() -> PreTrainedTokenizerFast:
    """Writes the beginning-of-sequence token by itself, as CPOTrainer does for all tokenizers."""
    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


def run(
    trainer_class: type, args_class: type, directory: Path, **settings: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]], Any]:
    """Parameters after three steps, the log, and the trainer."""
    model = fsrl_model(tiny_model().double(), sae=tiny_sae(dtype="float64"), l1_coeff=0.7)
    args = args_class(str(directory), **{**SETTINGS, **settings})
    trainer = with_fsrl(trainer_class)(
        model,
        args=args,
        train_dataset=tiny_preferences(6),
        eval_dataset=tiny_preferences(3, seed=1),
        processing_class=tokenizer(),
    )
    trainer.train()
    parameters = only_layer(model).fsrl_adapter["default"].named_parameters()
    return {n: p.detach() for n, p in parameters}, trainer.state.log_history, trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.2},
        {"cpo_alpha": 0.5, "gradient_accumulation_steps": 2},
    ],
    ids=["paper", "smooth", "with-likelihood"],
)
def test_both_trainers_give_the_same_numbers(settings: dict[str, Any], tmp_path: Path) -> None:
    assert issubclass(SimPOTrainer, CPOTrainer)
    first, log, one = run(SimPOTrainer, SimPOConfig, tmp_path, **settings)
    second, other_log, other = run(StableSimPOTrainer, StableSimPOConfig, tmp_path, **settings)
    start = only_layer(fsrl_model()).fsrl_adapter["default"].weight
    assert (first["weight"] - start).abs().max() > 1e-3
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-9, atol=1e-12, msg=name)
    steps = [row for row in log if "loss" in row]
    other_steps = [row for row in other_log if "loss" in row]
    assert len(steps) == len(other_steps) == 3
    shared = ["loss", "grad_norm", "fsrl/l0", "fsrl/penalty"]
    shared += [name for name in steps[0] if name.startswith(("rewards/", "logps/"))]
    assert len(shared) == 10
    for row, other_row in zip(steps, other_steps, strict=True):
        for name in shared:
            assert other_row[name] == pytest.approx(row[name], rel=1e-5), name
    assert other.evaluate()["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-5)


def test_no_reference_is_kept(tmp_path: Path) -> None:
    _, _, trainer = run(StableSimPOTrainer, StableSimPOConfig, tmp_path)
    assert trainer.ref_model is None
    assert set(trainer.model.peft_config) == {"default"}
    forwards = []

    def count(module: nn.Module, args: Any) -> None:
        forwards.append(torch.is_grad_enabled())

    hook = trainer.model.get_base_model().register_forward_pre_hook(count)
    trainer.model.train()
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    hook.remove()
    assert forwards == [True]


def test_another_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`loss_type` must be 'simpo', got hinge"):
        StableSimPOConfig(str(tmp_path), **SETTINGS, loss_type="hinge")


def test_without_the_experimental_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.experimental.cpo", None)
    try:
        module = importlib.reload(peft_fsrl.training.simpo)
        assert module.SimPOTrainer is module.StableSimPOTrainer
        assert issubclass(module.SimPOTrainer, DPOTrainer)
        assert module.SimPOConfig is module.StableSimPOConfig
    finally:
        monkeypatch.undo()
        importlib.reload(peft_fsrl.training.simpo)


@pytest.mark.parametrize("config", [SimPOConfig, StableSimPOConfig])
def test_defaults_are_the_papers(config: Any, tmp_path: Path) -> None:
    args = config(str(tmp_path), use_cpu=True, bf16=False)
    assert args.loss_type in ("simpo", ["simpo"])
    assert (args.cpo_alpha, args.beta, args.simpo_gamma) == (0.0, 10.0, 5.0)
    assert issubclass(SimPOConfig, CPOConfig)
