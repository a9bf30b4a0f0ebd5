"""Score a model on preference pairs: SimPO loss, accuracy and margin, without any trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .._running import evaluating
from ..objectives import simpo_loss
from ..tokens import Tokenized, tokenize
from .records import PreferenceScores

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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


def preference_margins(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], tokenizer: Any, beta: float
) -> Float[Tensor, "pairs"]:
    """``beta * (mean log p(chosen) - mean log p(rejected))`` of each pair, in one forward pass.

    Args:
        model: a causal language model; where gradients are on, the result carries its graph.
        rows: with the texts ``prompt``, ``chosen`` and ``rejected``.
        tokenizer: the model's tokenizer.
        beta: SimPO's reward scale.

    Returns:
        Shape ``(pairs,)``.

    Raises:
        ValueError: for an answer without tokens.
    """
    return margins_of(model, tokenize_pairs(rows, tokenizer), beta)


def tokenize_pairs(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Tokenized]:
    """All chosen sides, then all rejected ones.

    Raises:
        ValueError: for an answer without tokens.
    """
    sides = [
        tokenize(row["prompt"], row[side], tokenizer)
        for side in ("chosen", "rejected")
        for row in rows
    ]
    _refuse_empty_answers(sides, rows)
    return sides


def margins_of(model: nn.Module, sides: Sequence[Tokenized], beta: float) -> Float[Tensor, "pairs"]:
    """See ``preference_margins``, of pairs that ``tokenize_pairs`` has tokenised."""
    device = next(model.parameters()).device
    rewards = beta * mean_log_probability(model, pad(sides, device))
    return rewards[: len(sides) // 2] - rewards[len(sides) // 2 :]


def score_preferences(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    beta: float = 10.0,
    gamma: float = 5.0,
    batch_size: int = 16,
    description: str | None = None,
) -> PreferenceScores:
    """SimPO loss and margin of every pair: ``-log sigmoid(margin - gamma)``.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        dataset: rows with the texts ``prompt``, ``chosen`` and ``rejected``.
        tokenizer: the model's tokenizer.
        beta: SimPO's reward scale.
        gamma: SimPO's target margin, as TRL's ``simpo_gamma`` (the paper's gamma/beta times beta).
        batch_size: pairs per forward pass.
        description: shown beside the progress bar; None shows no bar.

    Raises:
        ValueError: for an empty data set, or a row whose answer has no tokens.
    """
    losses: list[float] = []
    margins: list[float] = []
    lengths: tuple[list[int], list[int]] = ([], [])
    progress = tqdm(desc=description, unit="pair", disable=description is None, leave=False)
    with evaluating(model), progress:
        for rows in batched(dataset, batch_size):
            sides = tokenize_pairs(rows, tokenizer)
            margin = margins_of(model, sides, beta)
            margins += margin.tolist()
            losses += simpo_loss(margin, gamma).tolist()
            said = [len(side.input_ids) - side.n_prompt for side in sides]
            lengths[0].extend(said[: len(rows)])
            lengths[1].extend(said[len(rows) :])
            progress.update(len(rows))
    if not losses:
        raise ValueError("Expected at least one preference pair, found none.")
    return PreferenceScores(tuple(losses), tuple(margins), tuple(lengths[0]), tuple(lengths[1]))


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


def _refuse_empty_answers(sides: Sequence[Tokenized], rows: Sequence[Mapping[str, Any]]) -> None:
    for index, side in enumerate(sides):
        if len(side.input_ids) <= side.n_prompt:
            name = "chosen" if index < len(rows) else "rejected"
            prompt = rows[index % len(rows)]["prompt"]
            raise ValueError(f"The {name} answer to the prompt {prompt[:80]!r} has no tokens.")
