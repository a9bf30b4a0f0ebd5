"""The analyses against naive loops, and against the trainer's own evaluation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

import helpers
from peft_fsrl.analysis import (
    Ablation,
    PreferenceScores,
    Session,
    Summary,
    compare_generations,
    compute_summary,
    render_summary,
    score_preferences,
)
from peft_fsrl.steering import scale_steering
from peft_fsrl.training.likelihood import pad
from peft_fsrl.training.tokens import Tokenized, tokenize


@pytest.fixture
def model() -> PeftModel:
    return helpers.fsrl_model()


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """Five pairs of unlike lengths."""
    return [
        {"prompt": "w3 w4", "chosen": " w5 w6 w7", "rejected": " w8"},
        {"prompt": "w9", "chosen": " w10", "rejected": " w11 w12 w13 w14"},
        {"prompt": "w15 w16 w17", "chosen": " w18 w18", "rejected": " w19 w20"},
        {"prompt": "w21", "chosen": " w22 w23", "rejected": " w24 w25 w26"},
        {"prompt": "w27 w28", "chosen": " w29", "rejected": " w30"},
    ]


def naive_reward(model: PeftModel, prompt: str, answer: str) -> float:
    """Mean log probability of the answer and EOS, one unpadded sequence, one token at a time."""
    tokenizer = helpers.tiny_tokenizer()
    start = [1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    ids = [*start, *tokenizer(answer, add_special_tokens=False)["input_ids"], 2]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    terms = [
        float(logits[t - 1, ids[t]] - logits[t - 1].logsumexp(0))
        for t in range(len(start), len(ids))
    ]
    return sum(terms) / len(terms)


def test_scores_equal_the_loss_written_out(model: PeftModel, rows: list[dict[str, str]]) -> None:
    scores = score_preferences(
        Session(model, helpers.tiny_tokenizer(), rows, beta=3.0, gamma=1.2, batch_size=2)
    )
    margins, losses = [], []
    for row in rows:
        chosen = naive_reward(model, row["prompt"], row["chosen"])
        rejected = naive_reward(model, row["prompt"], row["rejected"])
        margins.append(3.0 * (chosen - rejected))
        losses.append(math.log1p(math.exp(-(margins[-1] - 1.2))))
    assert scores.margins == pytest.approx(margins, abs=1e-5)
    assert scores.losses == pytest.approx(losses, abs=1e-5)
    assert scores.n == 5
    assert scores.loss == pytest.approx(sum(losses) / 5, abs=1e-5)
    assert scores.accuracy == sum(margin > 0 for margin in margins) / 5


def test_scores_equal_the_trainers_evaluation(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from peft_fsrl import with_fsrl

    model = helpers.fsrl_model()
    args = CPOConfig(
        str(tmp_path),
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=10.0,
        simpo_gamma=5.0,
        max_length=32,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        per_device_eval_batch_size=5,
        remove_unused_columns=False,
    )
    dataset = Dataset.from_list(rows)
    trainer = with_fsrl(CPOTrainer)(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=helpers.tiny_tokenizer(),
    )
    metrics = trainer.evaluate()
    scores = score_preferences(Session(model, helpers.tiny_tokenizer(), rows))
    assert scores.loss == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert scores.accuracy == pytest.approx(metrics["eval_rewards/accuracies"])
    assert scores.margin == pytest.approx(metrics["eval_rewards/margins"], rel=1e-4)


def test_scoring_restores_the_training_mode(model: PeftModel, rows: list[dict[str, str]]) -> None:
    model.train()
    score_preferences(Session(model, helpers.tiny_tokenizer(), rows))
    assert model.training
    assert torch.is_grad_enabled()


def test_scoring_refuses_what_it_cannot_score(model: PeftModel) -> None:
    tokenizer = helpers.tiny_tokenizer()
    with pytest.raises(ValueError, match="at least one preference pair"):
        score_preferences(Session(model, tokenizer, []))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="rejected answer to the prompt 'w3' has no tokens"):
        score_preferences(
            Session(model, tokenizer, [{"prompt": "w3", "chosen": " w4", "rejected": ""}])
        )


def test_tokenize_marks_the_prompt_and_adds_what_is_missing() -> None:
    tokenizer = helpers.tiny_tokenizer()
    assert tokenize("w3 w4", " w5", tokenizer) == Tokenized([1, 3, 4, 5, 2], 3)
    assert tokenize("<s> w3", " w5 </s>", tokenizer) == Tokenized([1, 3, 5, 2], 2)


def test_pad() -> None:
    batch = pad([Tokenized([1, 3, 5, 2], 2), Tokenized([1, 2], 1)], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[1, 3, 5, 2], [1, 2, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.answer_mask.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_generations_compare_base_and_trained(model: PeftModel) -> None:
    tokenizer = helpers.tiny_tokenizer()
    before = torch.random.get_rng_state()
    [first] = compare_generations(Session(model, tokenizer, seed=5), ["w3 w4"], max_new_tokens=8)
    assert torch.equal(before, torch.random.get_rng_state())
    assert compare_generations(Session(model, tokenizer, seed=5), ["w3 w4"], max_new_tokens=8) == (
        first,
    )
    with scale_steering(model, 0.0):
        [unsteered] = compare_generations(
            Session(model, tokenizer, seed=5), ["w3 w4"], max_new_tokens=8
        )
    assert unsteered.text("trained") == unsteered.text("base") == first.text("base")


def test_summary_round_trip_and_text(model: PeftModel, rows: list[dict[str, str]]) -> None:
    summary = compute_summary(
        Session(model, helpers.tiny_tokenizer(), Dataset.from_list(rows)),
        labels={3: "style"},
        categories={"style": [3, 4], "honesty": [5, 6]},
        n_generations=1,
    )
    assert Summary.from_json(summary.to_json()) == summary
    with model.disable_adapter():
        base = score_preferences(Session(model, helpers.tiny_tokenizer(), rows))
    assert summary.base == base
    text = render_summary(summary, n_features=3)
    for expected in (f"{base.loss:.3f}", f"{summary.trained.loss:.3f}", "style", "honesty"):
        assert expected in text
    assert "With the steering of some features zeroed" in text
    assert max(map(len, text.splitlines())) < 100


def test_a_record_of_other_fields_is_refused() -> None:
    with pytest.raises(ValueError, match="losses"):
        PreferenceScores.from_json('{"losses": [1.0]}')
    with pytest.raises(ValueError, match="fields"):
        Ablation.from_json('{"name": "x", "features": [1], "scores": 3, "control": []}')
    with pytest.raises(ValueError, match="Expecting value"):
        PreferenceScores.from_json("")
