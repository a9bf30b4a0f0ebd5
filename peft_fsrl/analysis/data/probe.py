"""How well some features alone tell which answer of a pair is preferred, on pairs not fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .reading import PairReading

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FOLDS = 5
# In standard errors, how far from zero a mean difference has to be for a feature to count.
_CLEAR = 2.0


def crossfit_scores(
    reading: PairReading,
    places: Int[Tensor, "some"],
    rows: Sequence[Mapping[str, Any]],
    weights: Float[Tensor, "pairs"] | None = None,
) -> Float[Tensor, "pairs"]:
    """``sum_j d_ij m_j / s_j`` of every pair, from those of other folds; above 0 for chosen.

    ``m`` is the mean of the differences ``d_i`` (chosen minus rejected) and ``s`` the mean of their
    squares. Features are taken as independent: covariances of hundreds of features that hear the
    same are not told from some hundred pairs, and what is fitted to them knows less. Only features
    count whose mean is clear of zero: many that know nothing drown a few that do. Which fold a pair
    is in follows from its text, so a pair that is there twice is not told from itself.

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
    values = reading.matched.double()
    for number in range(FOLDS):
        entry = torch.where(fold == number, 0.0, weights)[reading.pair]
        means, squares = reading.sums(entry * values), reading.sums(entry * values**2)
        errors = reading.sums((entry * values) ** 2) ** 0.5
        clear = inside & (means.abs() > _CLEAR * errors)
        direction = torch.where(clear, means / squares.clamp(min=1e-30), 0.0)
        told = torch.zeros_like(scores).index_add(
            0, reading.pair, values * direction[reading.place]
        )
        scores = torch.where(fold == number, told, scores)
    return scores


def _fold(row: Mapping[str, Any]) -> int:
    text = "\0".join(str(row[name]) for name in ("prompt", "chosen", "rejected"))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % FOLDS
