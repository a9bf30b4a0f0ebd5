"""Sample texts from the base model and from the trained one, under the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._running import evaluating
from ..steering import scale_steering
from ..tokens import prompt_ids
from .records import Continuation, Generation


def compare_generations(
    model: nn.Module,
    prompts: Sequence[str],
    tokenizer: Any,
    *,
    max_new_tokens: int = 48,
    seed: int = 0,
) -> tuple[Generation, ...]:
    """Continue each prompt with steering scaled to zero and as trained.

    Args:
        model: a generating model with an FSRL adapter.
        prompts: texts.
        tokenizer: the model's tokenizer.
        max_new_tokens: length limit of a continuation.
        seed: seed of the first prompt's sampling, the same for base and trained; the next prompt
            has the next seed.
    """
    results = []
    for number, prompt in enumerate(prompts):
        options = (model, prompt, tokenizer, max_new_tokens, seed + number)
        with scale_steering(model, 0.0):
            base = _continue("base", *options)
        trained = _continue("trained", *options)
        results.append(Generation(prompt, (base, trained)))
    return tuple(results)


def _continue(
    name: str, model: Any, prompt: str, tokenizer: Any, max_new_tokens: int, seed: int
) -> Continuation:
    ids = prompt_ids(prompt, tokenizer)
    device = next(model.parameters()).device
    input_ids = torch.tensor([ids], device=device)
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=True,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer = output[0, len(ids) :]
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    return Continuation(name, text, (), len(answer))
