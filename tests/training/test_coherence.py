"""Figures of sampled answers against plain counting, and their way into a trainer's logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback
from trl.experimental.cpo import CPOConfig, CPOTrainer

from helpers import fsrl_model, tiny_model, tiny_preferences, tiny_tokenizer
from peft_fsrl import FSRLConfig, organism, with_fsrl
from peft_fsrl.analysis import Session, compute_coherence, score_preferences
from peft_fsrl.steering import scale_steering
from peft_fsrl.training.coherence import CoherenceCallback, compute_distinct, compute_repetition

PROMPTS = ["w3", "w4 w5 w6 w7 w8", "w9 w10", "<s> w11 w12 w13"]


def test_repetition_and_distinct_by_hand() -> None:
    # Windows of four: 1234 2341 3412 4123 1234.
    assert compute_repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert compute_repetition([[7] * 9, [1, 2, 3, 4, 5]]) == pytest.approx((5 / 6 + 0) / 2)
    assert compute_repetition([[7] * 9, [1, 2, 3]]) == pytest.approx(5 / 6)
    assert compute_repetition([[1, 2, 3], []]) == 0.0
    assert compute_repetition([[1, 1, 1]], n=2) == pytest.approx(1 / 2)
    assert compute_distinct([[1, 2, 1], [2, 3]], 1) == pytest.approx(3 / 5)
    assert compute_distinct([[1, 2, 1], [2, 3]], 2) == pytest.approx(3 / 3)
    assert compute_distinct([[1, 2], [1, 2]], 2) == pytest.approx(1 / 2)
    assert compute_distinct([[1], []], 2) == 0.0


def decided(family: str = "llama") -> Any:
    """A tiny model whose next token depends on what it read, and so on steering."""
    model = tiny_model(family, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    return model


def spied(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every row that ``generate`` returns, prompt and padding included."""
    rows: list[list[int]] = []
    generate = type(model).generate

    def remember(self: PeftModel, **kwargs: Any) -> torch.Tensor:
        output = generate(self, **kwargs)
        rows.extend(output.tolist())
        return output

    monkeypatch.setattr(type(model), "generate", remember)
    return rows


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", ["<pad>", "</s>"])
def test_figures_equal_plain_counting(
    family: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = fsrl_model(decided(family)), tiny_tokenizer()
    tokenizer.pad_token = padding
    model.generation_config.eos_token_id = [2, 5, 6, 7, 8, 9, 10]
    rows = spied(model, monkeypatch)
    found = compute_coherence(model, PROMPTS, tokenizer, max_new_tokens=12, seed=3, batch_size=3)
    base, surprise, answers, counted, ended = decided(family), 0.0, [], 0, 0
    for number, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        ids = [int(word[1:]) if word[0] == "w" else 1 for word in prompt.split()]
        ids = ids if ids[0] == 1 else [1, *ids]
        longest = 6 if number < 3 else 4
        assert row[longest - len(ids) : longest] == ids
        answer: list[int] = []
        for token in row[longest:]:
            answer.append(token)
            if token in (2, 5, 6, 7, 8, 9, 10):
                break
        for t, token in enumerate(answer):
            with torch.no_grad():
                logits = base(torch.tensor([ids + answer[:t]])).logits[0, -1]
            surprise -= logits.log_softmax(-1)[token].item()
            counted += 1
        ended += answer[-1] in (2, 5, 6, 7, 8, 9, 10)
        answers.append([token for token in answer if token not in (2, 5, 6, 7, 8, 9, 10)])
    assert ended > 0, "the test needs an answer that ends"
    assert found.n == 4
    assert found.perplexity == pytest.approx(math.exp(surprise / counted), rel=1e-5)
    assert found.ended == ended / 4
    assert found.mean_length == sum(map(len, answers)) / 4
    assert found.repetition == compute_repetition(answers)
    assert (found.distinct_1, found.distinct_2) == (
        compute_distinct(answers, 1),
        compute_distinct(answers, 2),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_padding_does_not_reach_the_answers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = fsrl_model(decided(family)), tiny_tokenizer()
    # Sampling from one candidate: nothing depends on the order of the draws.
    model.generation_config.top_k = 1
    rows = spied(model, monkeypatch)
    for padding_side, batch_size in (("left", 4), ("right", 4), ("left", 1)):
        tokenizer.padding_side = padding_side
        compute_coherence(model, PROMPTS, tokenizer, max_new_tokens=6, batch_size=batch_size)
    answers = [row[-6:] for row in rows]
    assert answers[:4] == answers[4:8] == answers[8:]


def test_unsteered_is_the_base_model() -> None:
    model, tokenizer = fsrl_model(decided()), tiny_tokenizer()
    own = compute_coherence(model, PROMPTS, tokenizer, max_new_tokens=8, steered=False)
    with scale_steering(model, 0.0):
        assert compute_coherence(model, PROMPTS, tokenizer, max_new_tokens=8) == own
    assert compute_coherence(model, PROMPTS, tokenizer, max_new_tokens=8) != own


def test_nothing_is_disturbed() -> None:
    model, tokenizer = fsrl_model().train(), tiny_tokenizer()
    before = torch.get_rng_state()
    first = compute_coherence(model, PROMPTS, tokenizer, max_new_tokens=8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    torch.rand(3)
    assert compute_coherence(model, PROMPTS, tokenizer, max_new_tokens=8, seed=1) == first
    assert compute_coherence(model, PROMPTS, tokenizer, max_new_tokens=8, seed=2) != first
    with pytest.raises(ValueError, match="at least one prompt"):
        compute_coherence(model, [], tokenizer)


def test_a_diverged_adapter_is_measured_and_not_fatal() -> None:
    model, tokenizer = fsrl_model(decided()), tiny_tokenizer()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "fsrl" in name:
            parameter.data.fill_(math.nan)
    found = compute_coherence(model, PROMPTS, tokenizer, max_new_tokens=8)
    assert math.isfinite(found.perplexity)


class Reporter(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append({"step": state.global_step, **logs})


def train(folder: Path, with_callback: bool) -> tuple[Any, Reporter]:
    torch.manual_seed(0)
    rows, reporter = tiny_preferences(8), Reporter()
    args = CPOConfig(
        str(folder),
        loss_type="simpo",
        cpo_alpha=0.0,
        max_length=64,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        max_steps=4,
        learning_rate=0.05,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = with_fsrl(CPOTrainer)(
        model=fsrl_model(),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        callbacks=[reporter],
    )
    if with_callback:
        trainer.add_callback(CoherenceCallback(trainer, PROMPTS, max_new_tokens=6, seed=5))
    trainer.train()
    return trainer, reporter


NAMES = {"perplexity", "perplexity_unsteered", "repetition", "distinct_1", "distinct_2"}
NAMES |= {"mean_length", "ended"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_the_callback_logs_beside_the_loss_and_changes_nothing(tmp_path: Path) -> None:
    plain, _ = train(tmp_path / "plain", with_callback=False)
    trainer, reporter = train(tmp_path / "measured", with_callback=True)
    for (name, ours), (_, theirs) in zip(
        trainer.model.named_parameters(), plain.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    history = trainer.state.log_history
    at = [place for place, row in enumerate(history) if "eval_loss" in row]
    assert [history[place]["step"] for place in at] == [2, 4]
    for place in at:
        row = history[place + 1]
        assert row["step"] == history[place]["step"]
        named = {key for key in row if key.startswith("eval_coherence/")}
        assert named == {f"eval_coherence/{name}" for name in NAMES}
        assert any(named <= set(seen) and seen["step"] == row["step"] for seen in reporter.rows)
    metrics = trainer.evaluate()
    settings = {"max_new_tokens": 6, "seed": 5, "batch_size": 3}
    found = compute_coherence(trainer.model, PROMPTS, tiny_tokenizer(), **settings)
    for name in NAMES - {"perplexity_unsteered"}:
        assert metrics[f"eval_coherence/{name}"] == getattr(found, name)
    own = compute_coherence(
        trainer.model,
        PROMPTS,
        tiny_tokenizer(),
        max_new_tokens=6,
        seed=5,
        batch_size=3,
        steered=False,
    )
    unsteered = [row.get("eval_coherence/perplexity_unsteered") for row in reporter.rows]
    assert {value for value in unsteered if value is not None} == {own.perplexity}
    with pytest.raises(ValueError, match="at least one held-out prompt"):
        CoherenceCallback(trainer, [])


@pytest.mark.slow
def test_an_overtrained_adapter_is_seen_where_the_loss_is_content(tmp_path: Path) -> None:
    creature = organism.load()
    tokenizer, rows = creature.load_tokenizer(), creature.preferences(48, seed="held-out")
    config = FSRLConfig(layer=2, sae=str(creature.sae_path), l1_coeff=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(creature.load_model(), config)
    args = CPOConfig(
        str(tmp_path),
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=10.0,
        simpo_gamma=5.0,
        max_length=128,
        per_device_train_batch_size=16,
        max_steps=45,
        learning_rate=0.03,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    with_fsrl(CPOTrainer)(
        model=model,
        args=args,
        train_dataset=creature.preferences(45 * 16, seed="train"),
        processing_class=tokenizer,
    ).train()
    loss, found = {}, {}
    for scale in (0.0, 1.0, 4.0):
        with scale_steering(model, scale):
            loss[scale] = score_preferences(Session(model, tokenizer, rows)).loss
            found[scale] = compute_coherence(model, rows["prompt"][:16], tokenizer)
    # Judged by the loss both have learned the task, and four times the steering does no harm.
    assert max(loss[1.0], loss[4.0]) < loss[0.0] / 3
    assert found[4.0].perplexity > found[1.0].perplexity > 50 * found[0.0].perplexity
    assert found[0.0].ended > 0.9 > found[1.0].ended
    assert found[1.0].distinct_1 < found[0.0].distinct_1
