"""Log probabilities of answers under a model, from padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tokens import Tokenized

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Batch(NamedTuple):
    """Right-padded sequences.

    Attributes:
        input_ids: shape ``(batch, seq)``.
        attention_mask: 1 on real tokens, shape ``(batch, seq)``.
        answer_mask: 1 on the answer's tokens, shape ``(batch, seq)``.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    answer_mask: Int[Tensor, "batch seq"]


def pad(sequences: Sequence[Tokenized], device: torch.device) -> Batch:
    """Right-pad sequences into one batch."""
    longest = max((len(sequence.input_ids) for sequence in sequences), default=0)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    attention_mask, answer_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, (ids, n_prompt) in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        answer_mask[row, n_prompt : len(ids)] = 1
    return Batch(input_ids.to(device), attention_mask.to(device), answer_mask.to(device))


def mean_log_probability(model: nn.Module, batch: Batch) -> Float[Tensor, "batch"]:
    """Mean log probability of each answer's tokens, SimPO's reward over beta: ``(batch,)``."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    per_token = -F.cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    mask = batch.answer_mask[:, 1:].to(per_token.dtype)
    return (per_token * mask).sum(dim=1) / mask.sum(dim=1)


def next_log_probabilities(
    model: nn.Module,
    inputs: Mapping[str, Any],
    predicted: Bool[Tensor, "batch seq"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "tokens vocabulary"]:
    """What a model says of the tokens at ``predicted`` from those before them.

    Args:
        model: a causal language model.
        inputs: of its forward.
        predicted: which tokens; the first of a sequence, which nothing predicts, never counts.
        dtype: in this or a wider one.
    """
    logits = model(**inputs).logits[:, :-1]
    kept = logits[predicted[:, 1:].to(logits.device)]
    return torch.log_softmax(kept.to(torch.promote_types(kept.dtype, dtype)), dim=-1)


def compute_kl(
    log_p: Float[Tensor, "tokens vocabulary"], log_q: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, "tokens"]:
    """``KL(p || q)`` of each token, in nats."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive lists of at most ``size`` rows."""
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
