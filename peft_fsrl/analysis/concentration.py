"""On how few features the steering lies, and how strongly each kind is steered where it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import Record
from .composition import OTHER, membership
from .segments import TokenChunk, active_sae, stream_tokens
from .session import CHOSEN, Session
from .usage import Usage

SHARES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Of |v|, on a logarithmic scale: neighboring edges differ by 2 %.
_PER_DECADE, _LOWEST, _DECADES = 116, -12, 20


@dataclass(frozen=True)
class CategoryMass(Record):
    """How many of some features belong to a category, and their share of all steering mass."""

    category: str
    n: int
    mass: float


@dataclass(frozen=True)
class TopFeatures(Record):
    """The most steered features of an SAE.

    Attributes:
        share: of the SAE's features; rounded up to a whole number of them.
        n: how many features that is.
        mass: share of all steering that they carry.
        categories: those of them in each category.
    """

    share: float
    n: int
    mass: float
    categories: tuple[CategoryMass, ...]

    def ratio(self, first: str, second: str) -> float:
        """Features of one category to one of another; inf where there is none of the other.

        Raises:
            KeyError: for an unknown category.
        """
        counts = {each.category: each.n for each in self.categories}
        if not counts[first]:
            return 0.0
        return counts[first] / counts[second] if counts[second] else math.inf


@dataclass(frozen=True)
class Concentration(Record):
    """On how few features an adapter's steering lies.

    Attributes:
        segment: the tokens that count; see ``Usage``.
        d_sae: features of the SAE.
        n_steered: features steered at least once.
        gini: Gini coefficient of the features' mean ``|v|``, over all features of the SAE: 0 if all
            are steered alike, ``1 - 1 / d_sae`` if one has it all.
        gini_steered: the same over the features that were steered.
        top: the most steered features, from few to all.
    """

    segment: str
    d_sae: int
    n_steered: int
    gini: float
    gini_steered: float
    top: tuple[TopFeatures, ...]


def compute_concentration(
    usage: Usage,
    d_sae: int,
    categories: Mapping[str, Sequence[int]] | None = None,
    *,
    shares: Sequence[float] = SHARES,
) -> Concentration:
    """Gini coefficient, mass and categories of the most steered features, from their use alone.

    Args:
        usage: from ``compute_usage``.
        d_sae: features of the SAE.
        categories: feature indices by category. Where a share takes in features that are never
            steered, these come in the order of their index.
        shares: of the SAE's features, each above 0 and at most 1.

    Raises:
        ValueError: for a share out of range, or an adapter that steers nothing here.
    """
    if not usage.features:
        raise ValueError(f"Nothing is steered on the {usage.segment!r} tokens.")
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"Expected shares above 0 and up to 1, got {list(shares)}.")
    masses = {use.feature: use.mean_abs_steering for use in usage.features}
    total = sum(masses.values())
    order = sorted(masses, key=lambda feature: -masses[feature])
    order += [feature for feature in range(d_sae) if feature not in masses]
    top = []
    for share in shares:
        chosen = order[: math.ceil(share * d_sae)]
        found = []
        for name, features in (categories or {}).items():
            mine = set(features) & set(chosen)
            mass = sum(masses.get(feature, 0.0) for feature in mine) / total
            found.append(CategoryMass(name, len(mine), mass))
        mass = sum(masses.get(feature, 0.0) for feature in chosen) / total
        top.append(TopFeatures(share, len(chosen), mass, tuple(found)))
    sizes = list(masses.values())
    return Concentration(
        segment=usage.segment,
        d_sae=d_sae,
        n_steered=len(sizes),
        gini=gini([*sizes, *[0.0] * (d_sae - len(sizes))]),
        gini_steered=gini(sizes),
        top=tuple(top),
    )


def gini(values: Sequence[float]) -> float:
    """Half the mean absolute difference of two values, drawn with replacement, over their mean.

    Raises:
        ValueError: for values of which none is above zero.
    """
    ordered, n = sorted(values), len(values)
    total = sum(ordered)
    if not total > 0:
        raise ValueError("Expected values with a sum above zero: there is nothing to share.")
    return sum((2 * place - n + 1) * value for place, value in enumerate(ordered)) / (n * total)


@dataclass(frozen=True)
class Magnitudes(Record):
    """How strongly the features of a category are steered, where they are.

    Attributes:
        category: its name; ``"other"`` for features in no category.
        n: pairs of token and feature at which it is steered.
        promoted: share of them with ``v > 0``.
        mean: of ``|v|`` over them; 0 where there is none.
        quantiles: of ``|v|`` over them, at ``QUANTILES``, to 2 %; empty where there is none.
    """

    category: str
    n: int
    promoted: float
    mean: float
    quantiles: tuple[float, ...]


def measure_magnitudes(
    session: Session, categories: Mapping[str, Sequence[int]], *, segment: str = CHOSEN
) -> tuple[Magnitudes, ...]:
    """The distribution of ``|v|`` over the tokens at which it is not zero, by category.

    Kept are counts on a logarithmic scale: memory does not grow with the data set.

    Args:
        session: its model has one FSRL layer.
        categories: feature indices by category. A feature in two of them counts in both.
        segment: see ``Usage``.

    Returns:
        One record per category, ``"other"`` last.

    Raises:
        ValueError: for a category named ``"other"``, and as ``stream_tokens`` does.
        IndexError: for a feature that the SAE does not have.
    """
    columns = membership(active_sae(session.model), categories)[:, :-1].bool()
    n_columns = columns.shape[1]
    counts = torch.zeros(n_columns, _PER_DECADE * _DECADES, dtype=torch.long)
    promoted, sums = torch.zeros(2, n_columns, dtype=torch.float64)

    def add(chunk: TokenChunk) -> None:
        steered = chunk.v != 0
        v, features = chunk.v[steered].double().cpu(), steered.nonzero()[:, 1].cpu()
        places = ((v.abs().log10() - _LOWEST) * _PER_DECADE).long()
        places = places.clamp(0, counts.shape[1] - 1)
        for number in range(n_columns):
            mine = columns[features, number]
            counts[number] += torch.bincount(places[mine], minlength=counts.shape[1])
            promoted[number] += (v[mine] > 0).sum()
            sums[number] += v[mine].abs().sum()

    stream_tokens(session, [segment], add, "magnitudes")
    return tuple(
        _magnitudes(name, counts[number], float(promoted[number]), float(sums[number]))
        for number, name in enumerate((*categories, OTHER))
    )


def _magnitudes(name: str, counts: Tensor, promoted: float, total: float) -> Magnitudes:
    n = int(counts.sum())
    if not n:
        return Magnitudes(name, 0, 0.0, 0.0, ())
    below = counts.cumsum(0)
    quantiles = []
    for quantile in QUANTILES:
        place = int((below >= quantile * n).nonzero()[0])
        quantiles.append(10 ** ((place + 0.5) / _PER_DECADE + _LOWEST))
    return Magnitudes(name, n, promoted / n, total / n, tuple(quantiles))
