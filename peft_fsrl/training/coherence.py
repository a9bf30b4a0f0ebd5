"""Are a steered model's outputs still fluent? Measured on sampled answers, without a judge.

A preference loss compares two given answers and says nothing about what the model itself writes:
an over-trained adapter lowers it and writes nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..records import Record
from .likelihood import batched, mean_log_probability, pad
from .running import as_base, evaluating
from .sampling import Answer, model_variants, sample_answers
from .tokens import Tokenized

REPEATED_N = 4


@dataclass(frozen=True)
class Coherence(Record):
    """How fluent sampled answers are. Compare with the base model's own answers.

    Attributes:
        n: number of answers.
        perplexity: of all answers' tokens under the base model; rises where the steered model says
            what the base model would not.
        repetition: share of an answer's 4-grams that it has said before, mean over answers.
        distinct_1: different tokens over tokens, of all answers together.
        distinct_2: the same with pairs of consecutive tokens.
        mean_length: tokens per answer.
        ended: share of answers that ended by themselves.
    """

    n: int
    perplexity: float
    repetition: float
    distinct_1: float
    distinct_2: float
    mean_length: float
    ended: float


@dataclass(frozen=True)
class VariantCoherence(Record):
    """Coherence of one variant's answers; see ``Continuation`` for the names."""

    name: str
    coherence: Coherence


def compute_coherence(
    model: nn.Module,
    prompts: Sequence[str],
    tokenizer: Any,
    *,
    batch_size: int = 16,
    steered: bool = True,
    **sampling: Any,
) -> Coherence:
    """Sample an answer to each prompt and measure it, as ``Coherence`` says.

    Args:
        model: a generating model with an FSRL adapter.
        prompts: texts; a chat template has been applied where there is one.
        tokenizer: the model's tokenizer.
        batch_size: prompts per forward pass.
        steered: False samples from the base model, which gives the figures to compare with.
        sampling: further settings of ``sample_answers``, as ``max_new_tokens`` and ``seed``.

    Raises:
        ValueError: for no prompt.
    """
    with nullcontext() if steered else as_base(model):
        answers = sample_answers(model, prompts, tokenizer, batch_size=batch_size, **sampling)
    with as_base(model):
        return measure_answers(model, answers, batch_size=batch_size)


def compare_coherence(
    model: nn.Module,
    prompts: Sequence[str],
    tokenizer: Any,
    *,
    without: Mapping[str, Sequence[int]] | None = None,
    **settings: Any,
) -> tuple[VariantCoherence, ...]:
    """Coherence of the base model, the trained one, and it without the steering of a category.

    Args:
        model: a generating model with FSRL adapters.
        prompts: texts; a chat template has been applied where there is one.
        tokenizer: the model's tokenizer.
        without: features whose steering is zeroed, by category; one variant each.
        settings: of ``compute_coherence``, the same for every variant.

    Raises:
        ValueError: for no prompt.
        IndexError: for a feature that the SAE does not have.
    """
    found = []
    for name, enter in model_variants(model, without or {}).items():
        with enter():
            figures = compute_coherence(model, prompts, tokenizer, **settings)
        found.append(VariantCoherence(name, figures))
    return tuple(found)


def measure_answers(
    model: nn.Module, answers: Sequence[Answer], *, batch_size: int = 16
) -> Coherence:
    """The figures of answers that somebody has sampled already.

    Args:
        model: the base model, under which the perplexity is; it may be another's without steering.
        answers: from ``sample_answers``.
        batch_size: answers per forward pass.

    Raises:
        ValueError: for no answer.
    """
    if not answers:
        raise ValueError("Expected at least one answer to measure, got none.")
    device = next(model.parameters()).device
    surprise = torch.zeros((), dtype=torch.float64)
    with evaluating(model):
        for batch in batched(answers, batch_size):
            whole = [Tokenized(a.prompt + a.said + a.end, len(a.prompt)) for a in batch]
            means = mean_log_probability(model, pad(whole, device)).cpu().double()
            lengths = torch.tensor([len(text.input_ids) - text.n_prompt for text in whole])
            surprise -= (means * lengths).sum()
    said = [answer.said for answer in answers]
    n_tokens = sum(len(answer.said) + len(answer.end) for answer in answers)
    return Coherence(
        n=len(answers),
        perplexity=float((surprise / n_tokens).exp()),
        repetition=compute_repetition(said),
        distinct_1=compute_distinct(said, 1),
        distinct_2=compute_distinct(said, 2),
        mean_length=sum(len(answer) for answer in said) / len(said),
        ended=sum(bool(answer.end) for answer in answers) / len(answers),
    )


def compute_repetition(answers: Sequence[Sequence[int]], n: int = REPEATED_N) -> float:
    """``1 - unique n-grams / n-grams`` of each answer, averaged over those that have any.

    Source: seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training"
    (arXiv 1908.04319).

    Args:
        answers: token ids.
        n: length of an n-gram.

    Returns:
        From 0 (nothing said twice) to almost 1; 0 where no answer has ``n`` tokens.
    """
    grams = [found for answer in answers if (found := _grams(answer, n))]
    shares = [1 - len(set(found)) / len(found) for found in grams]
    return sum(shares) / len(shares) if shares else 0.0


def compute_distinct(answers: Sequence[Sequence[int]], n: int) -> float:
    """Unique n-grams over n-grams, of all answers together.

    Source: distinct-n of Li et al., "A Diversity-Promoting Objective Function for Neural
    Conversation Models" (arXiv 1510.03055).

    Args:
        answers: token ids.
        n: length of an n-gram.

    Returns:
        From almost 0 (all answers alike) to 1; 0 where no answer has ``n`` tokens.
    """
    grams = [gram for answer in answers for gram in _grams(answer, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]


class CoherenceCallback(TrainerCallback):
    """Samples answers at every evaluation and logs ``eval_coherence/...`` right after its row.

    A lower preference loss alone can mean nonsense. What is logged is
    ``peft_fsrl.analysis.Coherence``, field by field: the perplexity of the answers under the base
    model, their repetition, distinct-1 and distinct-2, their mean length and the share that ended;
    and, constant over a run, ``perplexity_unsteered``: that of the base model's own answers.

    The figures go the way of every log, to ``state.log_history`` and the reporters, at the same
    step as ``eval_loss``; and into the metrics that ``evaluate`` returns, so that
    ``metric_for_best_model`` may name one. Training is not disturbed: the state of the random
    generators is put back. Each process computes all of it, so that no process waits for another
    where parameters are sharded.

    Args:
        trainer: the trainer that this callback is added to.
        prompts: texts, from held-out data; see ``peft_fsrl.training.data.prompt_texts``.
        max_new_tokens: length limit of an answer.
        seed: seed of the sampling, the same at every evaluation.

    Raises:
        ValueError: for no prompt.

    Example:
        ``trainer.add_callback(CoherenceCallback(trainer, prompts))``
    """

    def __init__(
        self, trainer: Trainer, prompts: Sequence[str], max_new_tokens: int = 48, seed: int = 0
    ) -> None:
        if not prompts:
            raise ValueError("Expected at least one held-out prompt, got none.")
        self._trainer = trainer
        self._prompts = list(prompts)
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._unsteered: float | None = None

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Sample, measure, log."""
        settings: dict[str, Any] = {
            "max_new_tokens": self._max_new_tokens,
            "seed": self._seed,
            "batch_size": args.per_device_eval_batch_size,
        }
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        inputs = (model, self._prompts, self._trainer.processing_class)
        with self._trainer.compute_loss_context_manager():
            if self._unsteered is None:
                self._unsteered = compute_coherence(*inputs, steered=False, **settings).perplexity
            figures = asdict(compute_coherence(*inputs, **settings))
        del figures["n"]
        figures["perplexity_unsteered"] = self._unsteered
        named = {f"eval_coherence/{name}": value for name, value in figures.items()}
        if metrics is not None:
            metrics.update(named)
        # As a row of its own, because reporters have had the evaluation's already.
        self._trainer.log(dict(named))
