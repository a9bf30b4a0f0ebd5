"""Score a model on preference pairs: SimPO loss, accuracy and margin, without any trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..training.likelihood import batched, mean_log_probability, pad
from ..training.objectives import simpo_loss
from ..training.running import evaluating
from ..training.tokens import Tokenized, tokenize
from .records import PreferenceScores

if TYPE_CHECKING:
    from jaxtyping import Float


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


def _refuse_empty_answers(sides: Sequence[Tokenized], rows: Sequence[Mapping[str, Any]]) -> None:
    for index, side in enumerate(sides):
        if len(side.input_ids) <= side.n_prompt:
            name = "chosen" if index < len(rows) else "rejected"
            prompt = rows[index % len(rows)]["prompt"]
            raise ValueError(f"The {name} answer to the prompt {prompt[:80]!r} has no tokens.")
