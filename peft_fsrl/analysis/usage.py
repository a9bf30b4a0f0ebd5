"""Which features an adapter steers, how often and how strongly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import statistics
from .records import FeatureUse, RankFrequency, Usage
from .segments import TokenChunk, active_sae, stream_tokens


def compute_usage(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    segment: str = "chosen",
    labels: Mapping[int, str] | None = None,
    batch_size: int = 16,
    description: str | None = None,
) -> Usage:
    """Use of each feature over the tokens of one segment; see ``compute_usages``."""
    [usage] = compute_usages(
        model,
        dataset,
        tokenizer,
        segments=(segment,),
        labels=labels,
        batch_size=batch_size,
        description=description,
    )
    return usage


def compute_usages(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    segments: Sequence[str] = ("prompt", "prompt_chosen", "prompt_rejected"),
    labels: Mapping[int, str] | None = None,
    batch_size: int = 16,
    description: str | None = None,
) -> tuple[Usage, ...]:
    """Use of each feature over several segments, in one pass over the data.

    Padding and special tokens (BOS, EOS, marks of a chat's turns) never count, so no rate can pass
    one. The ``l0`` that a trainer logs is over all real tokens, those included. Only sums per
    feature are kept: memory does not grow with the data set.

    Args:
        model: a model with one FSRL layer.
        dataset: rows with the text ``prompt`` and the answers that the segments name.
        tokenizer: the model's tokenizer.
        segments: see ``Usage``. Of each row, tokens of the prompt count once.
        labels: what features detect, where known.
        batch_size: rows per forward pass, of both answers together where both are needed.
        description: shown beside the progress bar; None shows no bar.

    Returns:
        One record per segment, in their order.

    Raises:
        ValueError: for an unknown segment, more than one FSRL layer, an empty data set, or a
            segment without a token that counts.
    """
    totals = _Totals()
    stream_tokens(
        model,
        dataset,
        tokenizer,
        segments,
        totals.add,
        batch_size=batch_size,
        description=description,
    )
    index = active_sae(model).feature_index.tolist()
    return totals.to_usages(segments, index, labels or {})


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


class _Totals:
    """Sums over tokens: one row per segment, one column per feature, for each quantity."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._n_tokens: Tensor | None = None

    def add(self, chunk: TokenChunk) -> None:
        members, v = chunk.members.double(), chunk.v.double()
        quantities = (v != 0, v, v.abs(), v > 0, chunk.active())
        sums = torch.stack([members @ quantity.double() for quantity in quantities])
        self._sums = sums if self._sums is None else self._sums + sums
        n_tokens = members.sum(dim=1)
        self._n_tokens = n_tokens if self._n_tokens is None else self._n_tokens + n_tokens

    def to_usages(
        self, segments: Sequence[str], index: Sequence[int], labels: Mapping[int, str]
    ) -> tuple[Usage, ...]:
        tokens = [0.0] * len(segments) if self._n_tokens is None else self._n_tokens.tolist()
        empty = [name for name, n in zip(segments, tokens, strict=True) if not n]
        if empty:
            raise ValueError(f"The segment {empty[0]!r} has no token that counts.")
        assert self._sums is not None
        usages = []
        for number, (segment, n) in enumerate(zip(segments, tokens, strict=True)):
            count, signed, absolute, promoted, active = (self._sums[:, number] / n).cpu()
            order = [int(i) for i in absolute.argsort(descending=True) if count[i] > 0]
            features = tuple(
                FeatureUse(
                    feature=index[i],
                    frequency=float(count[i]),
                    mean_steering=float(signed[i]),
                    mean_abs_steering=float(absolute[i]),
                    promoted=float(promoted[i]),
                    active=float(active[i]),
                    label=labels.get(index[i]),
                )
                for i in order
            )
            total, mass = float(count.sum()), float(absolute.sum())
            usages.append(Usage(segment, int(n), total, mass, features))
        return tuple(usages)
