"""Score a model on preference pairs: SimPO loss, accuracy and margin, without any trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..records import Record
from ..training.likelihood import mean_log_probability, pad
from ..training.objectives import simpo_loss
from ..training.running import evaluating
from ..training.tokens import Tokenized
from .session import Session

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class PreferenceScores(Record):
    """How a model ranks preference pairs under SimPO's length-normalized reward.

    Attributes:
        losses: SimPO loss of each pair, without any penalty.
        margins: ``beta * (mean log p(chosen) - mean log p(rejected))`` of each pair.
        chosen_tokens: number of tokens of each chosen answer.
        rejected_tokens: number of tokens of each rejected answer.
    """

    losses: tuple[float, ...]
    margins: tuple[float, ...]
    chosen_tokens: tuple[int, ...]
    rejected_tokens: tuple[int, ...]

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """Mean SimPO loss."""
        return sum(self.losses) / len(self.losses)

    @property
    def accuracy(self) -> float:
        """Share of pairs in which the chosen answer has the larger reward."""
        return sum(margin > 0 for margin in self.margins) / len(self.margins)

    @property
    def margin(self) -> float:
        """Mean reward margin."""
        return sum(self.margins) / len(self.margins)


def score_preferences(session: Session, doing: str = "scores") -> PreferenceScores:
    """SimPO loss and margin of every pair: ``-log sigmoid(margin - gamma)``.

    Args:
        session: the model as it is now, and the pairs.
        doing: shown beside the progress bar.

    Raises:
        ValueError: for an empty data set, or a row whose answer has no tokens.
    """
    losses: list[float] = []
    margins: list[float] = []
    lengths: tuple[list[int], list[int]] = ([], [])
    with evaluating(session.model):
        for texts in session.batches(doing):
            margin = preference_margins(session.model, texts, session.beta)
            margins += margin.tolist()
            losses += simpo_loss(margin, session.gamma).tolist()
            said = [len(text.input_ids) - text.n_prompt for text in texts]
            lengths[0].extend(said[: len(margin)])
            lengths[1].extend(said[len(margin) :])
    return PreferenceScores(tuple(losses), tuple(margins), tuple(lengths[0]), tuple(lengths[1]))


def preference_margins(
    model: nn.Module, texts: Sequence[Tokenized], beta: float
) -> Float[Tensor, "pairs"]:
    """``beta * (mean log p(chosen) - mean log p(rejected))`` of each pair, in one forward pass.

    Args:
        model: where gradients are on, the result carries its graph.
        texts: all chosen sides, then all rejected ones, as ``Session.batches`` gives them.
        beta: SimPO's reward scale.
    """
    batch = pad(texts, next(model.parameters()).device)
    chosen, rejected = (beta * mean_log_probability(model, batch)).chunk(2)
    return chosen - rejected
