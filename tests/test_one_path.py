"""Training, generation, analysis and export all run ``functional.steer``, from the layer alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.experimental.cpo import CPOConfig, CPOTrainer

import peft_fsrl
from equivalence_helpers import batches
from helpers import fsrl_model, tiny_preferences, tiny_sae, tiny_tokenizer, token_ids
from peft_fsrl import functional, observe, with_fsrl
from peft_fsrl.analysis import Session, compute_usage, score_preferences
from peft_fsrl.equivalence import to_lora

PACKAGE = Path(peft_fsrl.__file__).parent


def train(model: Any, tmp_path: Path) -> None:
    args = CPOConfig(
        str(tmp_path),
        loss_type="simpo",
        cpo_alpha=0.0,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        # Recomputed, the formula would be called by autograd, and not from the layer.
        gradient_checkpointing=False,
    )
    trainer = with_fsrl(CPOTrainer)(
        model, args=args, train_dataset=tiny_preferences(4), processing_class=tiny_tokenizer()
    )
    trainer.train()


def generate(model: Any, tmp_path: Path) -> None:
    model.generate(input_ids=token_ids(), max_new_tokens=2, do_sample=False)


def analyze(model: Any, tmp_path: Path) -> None:
    session = Session(model, tiny_tokenizer(), tiny_preferences(4))
    score_preferences(session)
    compute_usage(session)


def observing(model: Any, tmp_path: Path) -> None:
    with observe(model, lambda event: None), torch.no_grad():
        model(token_ids())


def export(model: Any, tmp_path: Path) -> None:
    to_lora(model, batches(), 2, ridge=1e-3)


@pytest.mark.parametrize("use", [train, generate, analyze, observing, export])
def test_one_formula_one_way_to_it(
    use: Callable[[Any, Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    callers: set[str] = set()
    outputs: list[torch.Tensor] = []
    steer = functional.steer

    def watched(*args: Any, **kwargs: Any) -> Any:
        frames = [f.filename for f in traceback.extract_stack() if str(PACKAGE) in f.filename]
        callers.add(Path(frames[-1]).relative_to(PACKAGE).as_posix())
        steered = steer(*args, **kwargs)
        outputs.append(steered.output.detach())
        return steered

    monkeypatch.setattr(functional, "steer", watched)
    use(fsrl_model(sae=tiny_sae(), l1_coeff=0.1), tmp_path)
    assert callers == {"tuner/layer.py"}
    # And no second way: without the formula there is no such result.
    monkeypatch.setattr(functional, "steer", None)
    with pytest.raises(TypeError, match=r"NoneType|first argument must be callable"):
        use(fsrl_model(sae=tiny_sae(), l1_coeff=0.1), tmp_path)
