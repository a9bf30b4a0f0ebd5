"""Is what a steered model says still language? Figures of sampled answers, without any judge.

A preference loss compares two given answers and says nothing about what the model itself writes:
an adapter that was trained too far lowers it and talks nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .._running import evaluating
from ..steering import base_model, scale_steering
from ..tokens import Tokenized, prompt_ids
from .preferences import batched, mean_log_probability, pad
from .records import Coherence

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
    if not prompts:
        raise ValueError("Expected at least one prompt to answer, got none.")
    device = next(model.parameters()).device
    stops = _stop_ids(model, tokenizer)
    answers: list[list[int]] = []
    surprise = torch.zeros((), dtype=torch.float64)
    with evaluating(model), _seeded(seed):
        for texts in batched(prompts, batch_size):
            ids = [prompt_ids(text, tokenizer) for text in texts]
            with nullcontext() if steered else scale_steering(model, 0.0):
                rows = _sample(model, ids, tokenizer.pad_token_id or 0, max_new_tokens, device)
            sampled = [_until_stop(row, stops) for row in rows]
            whole = [Tokenized(p + a, len(p)) for p, a in zip(ids, sampled, strict=True)]
            with scale_steering(model, 0.0):
                means = mean_log_probability(model, pad(whole, device)).cpu().double()
            surprise -= (means * torch.tensor([len(answer) for answer in sampled])).sum()
            answers += sampled
    said = [answer[:-1] if answer[-1] in stops else answer for answer in answers]
    return Coherence(
        n=len(answers),
        perplexity=float((surprise / sum(len(answer) for answer in answers)).exp()),
        repetition=compute_repetition(said),
        distinct_1=compute_distinct(said, 1),
        distinct_2=compute_distinct(said, 2),
        mean_length=sum(len(answer) for answer in said) / len(said),
        ended=sum(answer[-1] in stops for answer in answers) / len(answers),
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


def _sample(
    model: Any, ids: list[list[int]], padding: int, max_new_tokens: int, device: torch.device
) -> list[list[int]]:
    # Padding on the left, so that every answer follows its prompt at once.
    longest = max(len(prompt) for prompt in ids)
    input_ids = [[padding] * (longest - len(prompt)) + prompt for prompt in ids]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in ids]
    output = model.generate(
        input_ids=torch.tensor(input_ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        do_sample=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=padding,
        use_cache=True,
        # An adapter that diverged must show in the figures, not end the evaluation.
        remove_invalid_values=True,
    )
    answers: list[list[int]] = output[:, longest:].tolist()
    return answers


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    # What follows is padding, whose id may be that of the end.
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def _stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    found = getattr(base_model(model), "generation_config", None)
    stops = getattr(found, "eos_token_id", None)
    stops = tokenizer.eos_token_id if stops is None else stops
    return set(stops if isinstance(stops, list) else [stops])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A fixed random state on every device; the former one is back on leaving."""
    with torch.random.fork_rng(list(range(torch.accelerator.device_count()))):
        torch.manual_seed(seed)
        yield
