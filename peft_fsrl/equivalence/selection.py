"""Which few features of a dictionary span most of a change, from its second moment alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

# Beyond these the change has no direction that could decide between features.
_MAX_DIRECTIONS = 256
# A feature that the chosen ones span already: what is left of it is rounding.
_SPANNED = 1e-9


class Selection(NamedTuple):
    """Features and what they span.

    Attributes:
        features: positions in the dictionary, by falling ``shares``.
        shares: by how much the spanned share would fall without each.
        spanned: the share of ``E ||y||^2`` that lies in their span.
    """

    features: tuple[int, ...]
    shares: tuple[float, ...]
    spanned: float


def select_features(
    second_moment: Float[Tensor, "d d"],
    directions: Float[Tensor, "n d"],
    *,
    n_features: int,
    min_gain: float,
) -> Selection:
    """Features whose span holds as much as possible of ``y``.

    Order-recursive matching pursuit on the second moment: each step adds the feature that raises
    the spanned share most. Then each is exchanged wherever another spans more, until none does, and
    as long as one feature fewer spans as much after such exchanges, one goes.

    Args:
        second_moment: ``E y y^T``.
        directions: of the dictionary's features.
        n_features: at most so many.
        min_gain: stop where the next feature would add less than this share, and drop what adds
            less.
    """
    values, vectors = torch.linalg.eigh(second_moment)
    return _select(_Pursuit(values, vectors, directions), n_features, min_gain)


def compute_chance(
    second_moment: Float[Tensor, "d d"],
    directions: Float[Tensor, "n d"],
    *,
    n_features: int,
    seed: int = 0,
) -> float:
    """The share that so many features, chosen alike, span of a change that knows nothing of them.

    That is a change with the same eigenvalues in random directions.
    """
    values = torch.linalg.eigvalsh(second_moment)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*second_moment.shape, generator=generator, dtype=values.dtype)
    vectors = torch.linalg.qr(noise[:, :_MAX_DIRECTIONS]).Q
    pursuit = _Pursuit(values[-vectors.shape[1] :], vectors, directions)
    return _select(pursuit, n_features, 0.0).spanned


def _select(pursuit: _Pursuit, n_features: int, min_gain: float) -> Selection:
    chosen: list[int] = []
    while len(chosen) < n_features:
        feature, gain = pursuit.best_addition(chosen)
        if gain < min_gain or not gain:
            break
        chosen.append(feature)
    chosen = pursuit.shrink(pursuit.exchange(chosen), min_gain)
    spanned = pursuit.spanned(chosen)
    shares = {f: spanned - pursuit.spanned([g for g in chosen if g != f]) for f in chosen}
    order = sorted(chosen, key=lambda feature: -shares[feature])
    return Selection(tuple(order), tuple(shares[feature] for feature in order), spanned)


class _Pursuit:
    """A change by the eigenvalues, ascending, and eigenvectors of its second moment."""

    def __init__(self, values: Tensor, vectors: Tensor, directions: Tensor) -> None:
        self._total = float(values.clamp(min=0).sum())
        values, vectors = values[-_MAX_DIRECTIONS:], vectors[:, -_MAX_DIRECTIONS:]
        kept = values > 1e-12 * values[-1]
        self._factor = vectors[:, kept] * values[kept].sqrt()
        self._directions = directions
        self._norms = directions.square().sum(dim=1)

    def spanned(self, chosen: list[int]) -> float:
        return float((self._basis(chosen).T @ self._factor).square().sum()) / self._total

    def best_addition(self, chosen: list[int]) -> tuple[int, float]:
        basis = self._basis(chosen)
        left = self._factor - basis @ (basis.T @ self._factor)
        norms = self._norms - (self._directions @ basis).square().sum(dim=1)
        gains = (self._directions @ left).square().sum(dim=1) / norms
        usable = (norms > _SPANNED * self._norms) & (self._norms > 0)
        usable[chosen] = False
        gains = torch.where(usable, gains, 0) / self._total
        feature = int(gains.argmax())
        return feature, float(gains[feature])

    def shrink(self, chosen: list[int], min_gain: float) -> list[int]:
        while len(chosen) > 1:
            rests = [[other for other in chosen if other != feature] for feature in chosen]
            fewer = self.exchange(max(rests, key=self.spanned))
            if self.spanned(chosen) - self.spanned(fewer) >= min_gain:
                break
            chosen = fewer
        return chosen

    def exchange(self, chosen: list[int]) -> list[int]:
        improved = True
        while improved:
            improved = False
            for feature in list(chosen):
                rest = [other for other in chosen if other != feature]
                other, gain = self.best_addition(rest)
                # More than rounding, or two equal features would be exchanged for ever.
                if self.spanned(rest) + gain > self.spanned(chosen) + 1e-9:
                    chosen, improved = [*rest, other], True
        return chosen

    def _basis(self, chosen: list[int]) -> Tensor:
        if not chosen:
            return self._factor.new_zeros(len(self._factor), 0)
        basis: Tensor = torch.linalg.qr(self._directions[chosen].T).Q
        return basis
