"""Which features an adapter steers, how often and how strongly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..records import Record
from . import statistics
from .segments import TokenChunk, active_sae, stream_tokens
from .session import Session


@dataclass(frozen=True)
class FeatureUse(Record):
    """How an adapter uses one feature, over real tokens.

    Attributes:
        feature: index in the SAE.
        frequency: share of tokens on which it is steered.
        mean_steering: mean of ``v`` over all tokens, in units of feature activation.
        mean_abs_steering: mean of ``|v|`` over all tokens.
        promoted: share of tokens on which ``v > 0``; the rest of ``frequency`` is suppression.
        active: share of tokens on which the SAE itself finds the feature.
        label: what the feature detects, if known.
    """

    feature: int
    frequency: float
    mean_steering: float
    mean_abs_steering: float
    promoted: float
    active: float
    label: str | None = None


@dataclass(frozen=True)
class Usage(Record):
    """An adapter's use of all features that it ever steers, most steering mass first.

    Attributes:
        segment: the tokens that count: ``"prompt"``, ``"chosen"`` or ``"rejected"`` (answers
            alone), ``"prompt_chosen"`` or ``"prompt_rejected"``.
        n_tokens: real tokens counted.
        l0: mean number of steered features per token.
        l1: mean ``||v||_1`` per token.
        features: one entry per feature that was steered at least once.
    """

    segment: str
    n_tokens: int
    l0: float
    l1: float
    features: tuple[FeatureUse, ...]


def compute_usage(
    session: Session, *, segment: str = "chosen", labels: Mapping[int, str] | None = None
) -> Usage:
    """Use of each feature over the tokens of one segment; see ``compute_usages``."""
    [usage] = compute_usages(session, segments=(segment,), labels=labels)
    return usage


def compute_usages(
    session: Session,
    *,
    segments: Sequence[str] = ("prompt", "prompt_chosen", "prompt_rejected"),
    labels: Mapping[int, str] | None = None,
) -> tuple[Usage, ...]:
    """Use of each feature over several segments, in one pass over the data.

    Padding and special tokens (BOS, EOS, marks of a chat's turns) never count, so no rate can pass
    one. The ``l0`` that a trainer logs is over all real tokens, those included. Only sums per
    feature are kept: memory does not grow with the data set.

    Args:
        session: its model has one FSRL layer.
        segments: see ``Usage``. Of each row, tokens of the prompt count once.
        labels: what features detect, where known.

    Returns:
        One record per segment, in their order.

    Raises:
        ValueError: as ``stream_tokens`` does, or for a segment without a token that counts.
    """
    index = active_sae(session.model).feature_index.tolist()
    # For each segment and feature the tokens where it is steered, sums of v and |v|, the tokens
    # where it is promoted, and those where the SAE finds it.
    sums = torch.zeros(5, len(segments), len(index), dtype=torch.float64)
    n_tokens = torch.zeros(len(segments), dtype=torch.float64)

    def add(chunk: TokenChunk) -> None:
        members, v = chunk.members.double(), chunk.v.double()
        for total, quantity in zip(sums, (v != 0, v, v.abs(), v > 0, chunk.active()), strict=True):
            total += (members @ quantity.double()).cpu()
        n_tokens.add_(members.sum(dim=1).cpu())

    stream_tokens(session, segments, add, "feature use")
    usages = []
    for segment, n, of_segment in zip(segments, n_tokens.tolist(), sums.unbind(1), strict=True):
        if not n:
            raise ValueError(f"The segment {segment!r} has no token that counts.")
        count, signed, absolute, promoted, active = of_segment / n
        order = [int(i) for i in absolute.argsort(descending=True) if count[i] > 0]
        features = tuple(
            FeatureUse(
                feature=index[i],
                frequency=float(count[i]),
                mean_steering=float(signed[i]),
                mean_abs_steering=float(absolute[i]),
                promoted=float(promoted[i]),
                active=float(active[i]),
                label=(labels or {}).get(index[i]),
            )
            for i in order
        )
        usages.append(Usage(segment, int(n), float(count.sum()), float(absolute.sum()), features))
    return tuple(usages)


def require_chosen(usage: Usage) -> None:
    """Refuse use on other tokens than the chosen answers'.

    Raises:
        ValueError: for another segment.
    """
    if usage.segment != "chosen":
        raise ValueError(
            f"Expected the use of features on the chosen answers, got {usage.segment!r}. Make it "
            'with compute_usage(..., segment="chosen").'
        )


@dataclass(frozen=True)
class RankFrequency(Record):
    """How often features are steered against their rank, and an exponential through it (figure 5).

    Attributes:
        segment: the tokens that count; see ``Usage``.
        ranks: ranks, 1 is the most frequent; all of them, or a selection on a logarithmic scale.
        frequencies: share of tokens of the feature at each rank.
        n_features: how many features were steered at all.
        amplitude: of the fit ``amplitude * exp(-rate * rank)``, by least squares on the logarithm.
        rate: of the fit, per rank.
        r_squared: share of the variance of the logarithm that the fit explains.
    """

    segment: str
    ranks: tuple[int, ...]
    frequencies: tuple[float, ...]
    n_features: int
    amplitude: float
    rate: float
    r_squared: float


def compute_rank_frequency(usage: Usage, *, n_ranks: int = 200) -> RankFrequency:
    """Frequencies by rank and ``amplitude * exp(-rate * rank)`` through all of them (figure 5).

    Args:
        usage: from ``compute_usage``.
        n_ranks: ranks to keep; where there are more features, these lie evenly on a logarithmic
            scale. The fit uses every rank.

    Raises:
        ValueError: for fewer than two features, through which no curve is determined.
        ImportError: without the ``audit`` extra.
    """
    frequencies = sorted((use.frequency for use in usage.features), reverse=True)
    n = len(frequencies)
    if n < 2:
        raise ValueError(
            f"Expected at least two features steered on the {usage.segment!r} tokens to fit a "
            f"curve, got {n}."
        )
    line = statistics.fit_line(range(1, n + 1), [math.log(value) for value in frequencies])
    steps = max(1, n_ranks - 1)
    ranks = sorted({round(n ** (step / steps)) for step in range(steps + 1)})
    if n <= n_ranks:
        ranks = list(range(1, n + 1))
    return RankFrequency(
        segment=usage.segment,
        ranks=tuple(ranks),
        frequencies=tuple(frequencies[rank - 1] for rank in ranks),
        n_features=n,
        amplitude=math.exp(line.intercept),
        rate=-line.slope,
        r_squared=line.r_squared,
    )
