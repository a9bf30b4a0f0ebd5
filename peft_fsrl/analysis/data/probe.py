"""How well some features alone tell which answer of a pair is preferred, on pairs not fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import statistics
from .reading import PairReading

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FOLDS = 5
# Of the pairs it is fitted on a probe takes the features whose mean difference is so many standard
# errors from zero, and the most so, for more covariances are not estimated well.
_CLEAR, _MOST = 2.0, 256


def crossfit_scores(
    reading: PairReading,
    places: Int[Tensor, "some"],
    rows: Sequence[Mapping[str, Any]],
    weights: Float[Tensor, "pairs"] | None = None,
) -> Float[Tensor, "pairs"]:
    """``w^T d_i`` of every pair, ``w = S^-1 m`` from the pairs of other folds; above 0 for chosen.

    ``m`` is the mean of the differences ``d`` (chosen minus rejected) and ``S`` the shrunk mean of
    ``d d^T`` (Ledoit and Wolf, 2004): Fisher's discriminant for pairs. Which fold a pair is in
    follows from its text, so a pair that is there twice is not told from itself. In each fold anew,
    only features are taken whose mean is clear of zero: many that know nothing drown a few that do.

    Args:
        reading: of the pairs.
        places: the features, among the SAE's own.
        rows: the pairs' texts.
        weights: with which pairs count in the fit; None counts all alike.

    Returns:
        Zero for a pair in which none of the features differs, or where none is clear of zero.
    """
    weights = torch.ones(reading.n_pairs, dtype=torch.float64) if weights is None else weights
    fold = torch.tensor([_fold(row) for row in rows])
    scores = torch.zeros(reading.n_pairs, dtype=torch.float64)
    inside = torch.zeros(reading.n_features, dtype=torch.bool)
    inside[places] = True
    for number in range(FOLDS):
        fitted = torch.where(fold == number, 0.0, weights)
        entry, values = fitted[reading.pair], reading.matched.double()
        means, squares = reading.sums(entry * values), reading.sums(entry * values**2)
        errors = reading.sums((entry * values) ** 2) ** 0.5
        clear = torch.where(inside & (errors > 0), means.abs() / errors, 0.0)
        chosen = clear.topk(min(_MOST, reading.n_features)).indices
        chosen = chosen[clear[chosen] > _CLEAR]
        if not len(chosen):
            continue
        # In units of its own spread, or what is active most would count most.
        scale = (squares[chosen] / fitted.sum()) ** 0.5
        differences = reading.dense(chosen) / scale
        mean = fitted @ differences / fitted.sum()
        used = fitted > 0
        weighed = differences[used] * (fitted[used] / fitted[used].mean())[:, None] ** 0.5
        direction = torch.linalg.solve(statistics.shrunk_second_moment(weighed), mean)
        scores = torch.where(fold == number, differences @ direction, scores)
    return scores


def _fold(row: Mapping[str, Any]) -> int:
    text = "\0".join(str(row[name]) for name in ("prompt", "chosen", "rejected"))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % FOLDS
