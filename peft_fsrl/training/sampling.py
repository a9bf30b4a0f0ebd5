"""Sample answers from variants of a steered model, reproducibly and without side effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..steering import ablate_features, base_model
from .likelihood import batched
from .running import as_base, evaluating
from .tokens import prompt_ids

BASE, TRAINED = "base", "trained"
Variants = dict[str, Callable[[], AbstractContextManager[None]]]


class Answer(NamedTuple):
    """Token ids of a prompt and of what a model said to it.

    Attributes:
        prompt: with BOS, where the tokenizer has one.
        said: without the token that ended it.
        end: the token that ended it, as a list; empty where the length limit did.
    """

    prompt: list[int]
    said: list[int]
    end: list[int]


def model_variants(
    model: nn.Module, without: Mapping[str, Sequence[int]], layer_name: str | None = None
) -> Variants:
    """``"base"``, ``"trained"`` and a ``"without <category>"`` for each: what makes ``model`` so.

    Args:
        model: a model with FSRL adapters.
        without: features whose steering is zeroed, by category.
        layer_name: only at this wrapped module; None for all.

    Raises:
        IndexError: for a feature that the SAE does not have.
    """
    variants: Variants = {BASE: partial(as_base, model), TRAINED: nullcontext}
    for category, features in without.items():
        enter = partial(ablate_features, model, list(features), layer_name)
        with enter():
            variants[f"without {category}"] = enter
    return variants


def sample_answers(
    model: nn.Module,
    prompts: Sequence[str],
    tokenizer: Any,
    *,
    max_new_tokens: int = 48,
    seed: int = 0,
    batch_size: int = 16,
    **options: Any,
) -> list[Answer]:
    """One answer to each prompt.

    The state of every random generator is as before when this returns, and so is the model's mode.
    Sampling follows the model's ``generation_config``, with ``do_sample=True`` unless told
    otherwise.

    Args:
        model: a generating model.
        prompts: texts; a chat template has been applied where there is one.
        tokenizer: the model's tokenizer; its padding side does not matter.
        max_new_tokens: length limit of an answer.
        seed: seed of the sampling.
        batch_size: prompts per forward pass.
        options: for ``generate``.

    Raises:
        ValueError: for no prompt, or one without tokens.
    """
    if not prompts:
        raise ValueError("Expected at least one prompt to answer, got none.")
    device = next(model.parameters()).device
    stops = stop_ids(model, tokenizer)
    answers: list[Answer] = []
    with evaluating(model), seeded(seed):
        for texts in batched(prompts, batch_size):
            ids = [prompt_ids(text, tokenizer) for text in texts]
            for text, prompt in zip(texts, ids, strict=True):
                if not prompt:
                    raise ValueError(f"The prompt {text!r} has no tokens, and no BOS either.")
            settings = {"max_new_tokens": max_new_tokens, "do_sample": True, **options}
            rows = _generate(model, ids, tokenizer.pad_token_id or 0, device, settings)
            for prompt, row in zip(ids, rows, strict=True):
                # What follows the end is padding, whose id may be that of the end.
                end = next((i for i, token in enumerate(row) if token in stops), len(row))
                answers.append(Answer(prompt, row[:end], row[end : end + 1]))
    return answers


def stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    found = getattr(base_model(model), "generation_config", None)
    stops = getattr(found, "eos_token_id", None)
    stops = tokenizer.eos_token_id if stops is None else stops
    return set(stops if isinstance(stops, list) else [stops])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A fixed random state on every device; the former one is back on leaving."""
    with torch.random.fork_rng(list(range(torch.accelerator.device_count()))):
        torch.manual_seed(seed)
        yield


def _generate(
    model: Any, ids: list[list[int]], padding: int, device: torch.device, settings: dict[str, Any]
) -> list[list[int]]:
    # Padding on the left, so that every answer follows its prompt at once.
    longest = max(len(prompt) for prompt in ids)
    input_ids = [[padding] * (longest - len(prompt)) + prompt for prompt in ids]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in ids]
    output = model.generate(
        input_ids=torch.tensor(input_ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        pad_token_id=padding,
        use_cache=True,
        # An adapter that diverged must show in the figures, not end the evaluation.
        remove_invalid_values=True,
        **settings,
    )
    answers: list[list[int]] = output[:, longest:].tolist()
    return answers
