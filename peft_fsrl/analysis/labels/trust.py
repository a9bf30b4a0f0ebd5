"""How far to trust labels: against better ones, against one another, and as rates of error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...records import Interval, Record
from .. import statistics
from .source import FeatureLabel, Labels, require_fit


@dataclass(frozen=True)
class Agreement(Record):
    """Two sources about the same features, one category; the second is taken for the truth.

    Attributes:
        category: the category.
        judged: the source that is checked.
        reference: the other.
        both: features that both put in the category.
        only_judged: only the first.
        only_reference: only the second.
        neither: neither.
        mcc: Matthews correlation coefficient.
        kappa: Cohen's kappa.
    """

    category: str
    judged: str
    reference: str
    both: int
    only_judged: int
    only_reference: int
    neither: int
    mcc: Interval
    kappa: Interval


def compare_labels(
    judged: Labels,
    reference: Labels,
    categories: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Agreement, ...]:
    """Confusion matrix, MCC and Cohen's kappa per category, on the features that both label.

    Args:
        judged: the labels in question.
        reference: those taken for the truth, such as people's.
        categories: None for all that both know.
        level: confidence of the intervals, bootstrapped over features.
        seed: of the bootstrap.

    Raises:
        ValueError: for a category that one of them does not know, none, labels of different SAEs,
            or fewer than two features in common.
        ImportError: without the ``audit`` extra.
    """
    require_fit(judged, d_sae=reference.d_sae, fingerprint=reference.fingerprint)
    known = [name for name in judged.categories if name in reference.categories]
    wanted = known if categories is None else list(categories)
    if not wanted or not set(wanted) <= set(known):
        raise ValueError(
            f"Expected categories that both know, got {wanted}; {judged.source!r} knows "
            f"{list(judged.categories)}, {reference.source!r} knows {list(reference.categories)}."
        )
    ours = {label.feature: label.categories for label in judged.features}
    theirs = {label.feature: label.categories for label in reference.features}
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2:
        raise ValueError(
            f"Expected at least two features that both label, found {len(common)}: "
            f"{judged.source!r} labels {len(ours)}, {reference.source!r} labels {len(theirs)}."
        )

    def agreement(name: str) -> Agreement:
        a = [name in ours[feature] for feature in common]
        b = [name in theirs[feature] for feature in common]
        pairs = list(zip(a, b, strict=True))
        return Agreement(
            name,
            judged.source,
            reference.source,
            both=pairs.count((True, True)),
            only_judged=pairs.count((True, False)),
            only_reference=pairs.count((False, True)),
            neither=pairs.count((False, False)),
            mcc=statistics.matthews_correlation(a, b, level=level, seed=seed),
            kappa=statistics.cohen_kappa(a, b, level=level, seed=seed),
        )

    return tuple(map(agreement, wanted))


def compare_judges(
    labelings: Sequence[Labels],
    categories: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Agreement, ...]:
    """``compare_labels`` of every two sources, the earlier as ``judged``.

    Raises:
        ValueError: for fewer than two, and as ``compare_labels`` does.
        ImportError: without the ``audit`` extra.
    """
    if len(labelings) < 2:
        raise ValueError(f"Expected at least two labelings to compare, got {len(labelings)}.")
    return tuple(
        agreement
        for one, other in itertools.combinations(labelings, 2)
        for agreement in compare_labels(one, other, categories, level=level, seed=seed)
    )


def majority_labels(labelings: Sequence[Labels]) -> Labels:
    """One labeling from several: the majority's categories, and how many agree as the quality.

    Args:
        labelings: of several judges, or several runs; their common categories count.

    Returns:
        Labels of the features that all have labeled. A feature is in a category if more than half
        say so; ``quality`` is the mean over categories of the share that agrees with the majority.
        Ties make a feature undecided.

    Raises:
        ValueError: for fewer than two, or none in common.
    """
    if len(labelings) < 2:
        raise ValueError(f"Expected at least two labelings, got {len(labelings)}.")
    first, *others = labelings
    names = [n for n in first.categories if all(n in labels.categories for labels in others)]
    said: dict[int, list[FeatureLabel]] = {}
    for label in itertools.chain(*(labels.features for labels in labelings)):
        said.setdefault(label.feature, []).append(label)
    common = [each.feature for each in first.features if len(said[each.feature]) > len(others)]
    if not names or not common:
        raise ValueError("Expected labelings with categories and features in common.")
    features, undecided = [], []
    for feature in common:
        n = len(labelings)
        shares = {name: sum(name in s.categories for s in said[feature]) / n for name in names}
        if 0.5 in shares.values():
            undecided.append(feature)
            continue
        quality = sum(max(share, 1 - share) for share in shares.values()) / len(shares)
        chosen = tuple(name for name, share in shares.items() if share > 0.5)
        features.append(FeatureLabel(feature, said[feature][0].description, chosen, quality))
    source = "majority of " + ", ".join(labels.source for labels in labelings)
    found = tuple(names), first.d_sae, first.fingerprint, tuple(features), tuple(undecided)
    return Labels(source, *found)


@dataclass(frozen=True)
class ErrorRates(Record):
    """How a judge errs about one category: a two-by-two table against the truth.

    Attributes:
        category: the category.
        both: features that the judge puts in it and that belong to it; a count or a share.
        only_judged: that it puts there wrongly.
        only_true: that it wrongly leaves out.
        neither: that it rightly leaves out.
        exact: the shares are taken for known; otherwise the numbers are counts of a sample, as
            uncertain as that.
    """

    category: str
    both: float
    only_judged: float
    only_true: float
    neither: float
    exact: bool


def error_rates(agreement: Agreement) -> ErrorRates:
    """The judge's errors as an agreement with the truth has counted them."""
    a = agreement
    return ErrorRates(a.category, a.both, a.only_judged, a.only_reference, a.neither, exact=False)


def error_rates_for_mcc(
    category: str,
    mcc: float,
    *,
    judged_share: float,
    true_share: float | None = None,
    n: int | None = None,
) -> ErrorRates:
    """The only two-by-two table with a Matthews correlation and two given margins.

    With ``q`` of the features judged to be in the category and ``p`` belonging to it, the share of
    both is ``p q + mcc sqrt(p (1 - p) q (1 - q))``.

    Args:
        category: the category.
        mcc: of the judge against the truth, from 0 to 1.
        judged_share: of the features in the category by the judge.
        true_share: that belong to it; None takes the judge's share for it.
        n: features behind the coefficient; None takes the rates for exact.

    Raises:
        ValueError: for a number out of range, or a coefficient that these shares do not allow.
    """
    p, q = (judged_share if true_share is None else true_share), judged_share
    if not 0 < p < 1 or not 0 < q < 1 or not 0 <= mcc <= 1 or (n is not None and n < 1):
        raise ValueError(
            "Expected shares between 0 and 1, a coefficient from 0 to 1 and n of 1 or more, got "
            f"judged_share={judged_share}, true_share={true_share}, mcc={mcc}, n={n}."
        )
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    largest = (min(p, q) - p * q) / spread
    if mcc > largest + 1e-12:
        raise ValueError(
            f"With {q:.3g} judged and {p:.3g} true, a coefficient cannot exceed {largest:.3f}, got "
            f"{mcc}. Give another share."
        )
    both = min(p * q + mcc * spread, p, q)
    size = 1 if n is None else n
    return ErrorRates(
        category,
        both=size * both,
        only_judged=size * (q - both),
        only_true=size * (p - both),
        neither=size * (1 - p - q + both),
        exact=n is None,
    )
