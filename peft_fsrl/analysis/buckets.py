"""Preference scores by the length of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..records import Interval, Record
from . import statistics
from .preferences import PreferenceScores


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


def score_by_length(
    base: PreferenceScores, trained: PreferenceScores, *, n_buckets: int = 4
) -> tuple[LengthBucket, ...]:
    """Accuracy and margin of both models among pairs of similar length, shortest first.

    Accuracies have Wilson's interval, margins a bootstrap over pairs.

    Args:
        base: scores of the base model, on the same pairs as ``trained``.
        trained: scores of the trained one.
        n_buckets: their number at most, of about as many pairs each; pairs of one length stay
            together.

    Raises:
        ValueError: for scores of unlike pairs, fewer than two pairs, or no bucket.
        ImportError: without the ``audit`` extra.
    """
    _require_same_pairs(base, trained)
    lengths = mean_lengths(trained)
    buckets = []
    for rows in length_groups(trained, n_buckets):
        margins = {"base": [base.margins[i] for i in rows], "": [trained.margins[i] for i in rows]}
        buckets.append(
            LengthBucket(
                shortest=min(lengths[i] for i in rows),
                longest=max(lengths[i] for i in rows),
                n=len(rows),
                base_accuracy=statistics.proportion_interval([m > 0 for m in margins["base"]]),
                accuracy=statistics.proportion_interval([m > 0 for m in margins[""]]),
                base_margin=statistics.mean_interval(margins["base"]),
                margin=statistics.mean_interval(margins[""]),
            )
        )
    return tuple(buckets)


def compute_gain(base: PreferenceScores, trained: PreferenceScores, *, seed: int = 0) -> Interval:
    """Fall of the mean SimPO loss from base to trained, paired bootstrap over pairs.

    Raises:
        ValueError: for scores of unlike pairs, or fewer than two pairs.
        ImportError: without the ``audit`` extra.
    """
    _require_same_pairs(base, trained)
    return statistics.difference_interval(base.losses, trained.losses, seed=seed)


def mean_lengths(scores: PreferenceScores) -> list[float]:
    """Tokens of each pair's answers, chosen and rejected averaged."""
    pairs = zip(scores.chosen_tokens, scores.rejected_tokens, strict=True)
    return [(chosen + rejected) / 2 for chosen, rejected in pairs]


def length_groups(scores: PreferenceScores, n_groups: int) -> list[list[int]]:
    """Pairs by length, in groups of about equal size and of two pairs at least, shortest first.

    Pairs of one length stay together, so there may be fewer groups than asked for.

    Raises:
        ValueError: for no group, or fewer than two pairs.
    """
    if n_groups < 1 or scores.n < 2:
        raise ValueError(
            f"Expected one group and two pairs at least, got {n_groups} and {scores.n}."
        )
    lengths = mean_lengths(scores)
    order = sorted(range(scores.n), key=lambda pair: lengths[pair])
    groups: list[list[int]] = []
    start = 0
    for number in range(1, n_groups + 1):
        end = max(start, round(number * scores.n / n_groups))
        while 0 < end < scores.n and lengths[order[end]] == lengths[order[end - 1]]:
            end += 1
        groups.append(order[start:end])
        start = end
    return _merge_small(groups)


def _merge_small(groups: Sequence[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for group in groups:
        if merged and (len(group) < 2 or len(merged[-1]) < 2):
            merged[-1] = merged[-1] + group
        elif group:
            merged.append(list(group))
    return merged


def _require_same_pairs(base: PreferenceScores, trained: PreferenceScores) -> None:
    if (base.chosen_tokens, base.rejected_tokens) != (
        trained.chosen_tokens,
        trained.rejected_tokens,
    ):
        raise ValueError(
            f"Expected scores of the same pairs, got {base.n} and {trained.n} pairs whose answers "
            "differ in length."
        )
