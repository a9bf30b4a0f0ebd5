"""How far a model has moved from its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..training.likelihood import Batch, batched, pad
from ..training.running import evaluating
from .preferences import tokenize_pairs

if TYPE_CHECKING:
    from jaxtyping import Float


def compute_divergence(
    model: nn.Module,
    base: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    batch_size: int = 16,
    description: str | None = None,
) -> float:
    """Mean ``KL(model || base)`` of the next-token distributions, over the tokens of both answers.

    Args:
        model: a causal language model as it is now.
        base: another, with the same vocabulary; two separate models, because both are run as they
            are.
        dataset: rows with the texts ``prompt``, ``chosen`` and ``rejected``.
        tokenizer: the tokenizer of both.
        batch_size: pairs per forward pass.
        description: shown beside the progress bar; None shows no bar.

    Returns:
        Nats per token.

    Raises:
        ValueError: for an empty data set, or an answer without tokens.
    """
    total, n_tokens = 0.0, 0
    progress = tqdm(desc=description, unit="pair", disable=description is None, leave=False)
    with evaluating(model, base), progress:
        for rows in batched(dataset, batch_size):
            sides = tokenize_pairs(rows, tokenizer)
            ours = _log_probabilities(model, pad(sides, next(model.parameters()).device))
            theirs = _log_probabilities(base, pad(sides, next(base.parameters()).device))
            theirs = theirs.to(ours.device)
            total += float(F.kl_div(theirs, ours, log_target=True, reduction="sum"))
            n_tokens += len(ours)
            progress.update(len(rows))
    if not n_tokens:
        raise ValueError("Expected at least one preference pair, found none.")
    return total / n_tokens


def _log_probabilities(model: nn.Module, batch: Batch) -> Float[Tensor, "tokens vocabulary"]:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    kept = logits[batch.answer_mask[:, 1:].bool()]
    return torch.log_softmax(kept.to(torch.promote_types(kept.dtype, torch.float32)), dim=-1)
