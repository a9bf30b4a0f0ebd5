"""Is what a steered model says still language? Figures of sampled answers, without any judge.

A preference loss compares two given answers and says nothing about what the model itself writes:
an adapter that was trained too far lowers it and talks nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .._running import evaluating
from ..steering import scale_steering
from ..tokens import Tokenized
from .preferences import batched, mean_log_probability, pad
from .records import Coherence, VariantCoherence
from .sampling import Answer, model_variants, sample_answers

REPEATED_N = 4


def compute_coherence(
    model: nn.Module,
    prompts: Sequence[str],
    tokenizer: Any,
    *,
    max_new_tokens: int = 48,
    seed: int = 0,
    batch_size: int = 16,
    steered: bool = True,
) -> Coherence:
    """Sample an answer to each prompt and measure it, as ``Coherence`` says.

    The state of every random generator is as before when this returns, and so is the model's mode.
    Sampling follows the model's ``generation_config``, always with ``do_sample=True``.

    Args:
        model: a generating model with an FSRL adapter.
        prompts: texts; a chat template has been applied where there is one.
        tokenizer: the model's tokenizer; its padding side does not matter.
        max_new_tokens: length limit of an answer.
        seed: seed of the sampling.
        batch_size: prompts per forward pass.
        steered: sample from the steered model; False samples from the base model, which gives the
            figures to compare with.

    Raises:
        ValueError: for no prompt.
    """
    with nullcontext() if steered else scale_steering(model, 0.0):
        answers = sample_answers(
            model,
            prompts,
            tokenizer,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
        )
    with scale_steering(model, 0.0):
        return measure_answers(model, answers, batch_size=batch_size)


def compare_coherence(
    model: nn.Module,
    prompts: Sequence[str],
    tokenizer: Any,
    *,
    without: Mapping[str, Sequence[int]] | None = None,
    max_new_tokens: int = 48,
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[VariantCoherence, ...]:
    """Coherence of the base model, the trained one, and it without the steering of a category.

    Args:
        model: a generating model with FSRL adapters.
        prompts: see ``compute_coherence``.
        tokenizer: the model's tokenizer.
        without: features whose steering is zeroed, by category; one variant each.
        max_new_tokens: length limit of an answer.
        seed: seed of the sampling, the same for every variant.
        batch_size: prompts per forward pass.

    Raises:
        ValueError: for no prompt.
        IndexError: for a feature that the SAE does not have.
    """
    found = []
    for name, enter in model_variants(model, without or {}).items():
        with enter():
            figures = compute_coherence(
                model,
                prompts,
                tokenizer,
                max_new_tokens=max_new_tokens,
                seed=seed,
                batch_size=batch_size,
            )
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
