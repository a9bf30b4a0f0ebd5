"""How a model ranks preference pairs."""

from __future__ import annotations

from dataclasses import dataclass

from ...records import Interval, Record


@dataclass(frozen=True)
class PreferenceScores(Record):
    """How a model ranks preference pairs under SimPO's length-normalised reward.

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


@dataclass(frozen=True)
class LengthBucket(Record):
    """Preference pairs of similar answer length, under the base model and the trained one.

    Attributes:
        shortest: tokens of the shortest mean answer in it, chosen and rejected averaged.
        longest: tokens of the longest.
        n: number of pairs.
        base_accuracy: of the base model.
        accuracy: of the trained model.
        base_margin: mean reward margin of the base model.
        margin: of the trained model.
    """

    shortest: float
    longest: float
    n: int
    base_accuracy: Interval
    accuracy: Interval
    base_margin: Interval
    margin: Interval


@dataclass(frozen=True)
class WinRate(Record):
    """How often a judge prefers one model's answers to another's, each pair seen in both orders.

    Attributes:
        model: whose wins are counted.
        opponent: the other.
        judge: who judged.
        n: prompts judged.
        wins: preferred in both orders.
        ties: everything else, equal answers among them.
        losses: the other preferred in both orders.
        win_rate: ``(wins + ties / 2) / n``.
        consistency: share of prompts with the same verdict in both orders.
        unreadable: answers of the judge, of ``2 n`` at most, from which no verdict could be read.
    """

    model: str
    opponent: str
    judge: str
    n: int
    wins: int
    ties: int
    losses: int
    win_rate: Interval
    consistency: float
    unreadable: int
