"""Do conclusions survive the labels' errors? Figures under labels redrawn as the truth may be.

Each draw is a labeling that may be true, given what the judge said and how it errs: rates are
drawn from their posterior (Jeffreys' prior on a counted table), then each labeled feature's
membership from the rates. Errors of different features are independent. Features without a label
stay in no category.

How a feature's use enters is a choice:

- Without ``strata``, a feature in doubt is as likely to belong to a category whether it is used or
  not. Redrawing then pulls figures toward "no difference": a conclusion that survives it is safe,
  but the interval is not one for the true figure if the category truly is used more.
- With ``strata`` (``strata_by_use``), the judge errs alike whatever the use of a feature, and how
  common a category is may differ from one stratum of use to the next. Then intervals cover the
  true figure as far as the strata tell used features from others, and are wider.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ...records import Interval, Record
from ..composition import FeatureCounts, composition_of
from .source import Labels
from .trust import ErrorRates

if TYPE_CHECKING:
    import numpy as np

Categories = Mapping[str, Sequence[int]]
Measure = Callable[[Categories], Mapping[str, float]]


@dataclass(frozen=True)
class Robustness(Record):
    """A figure under the labels as they are, and under labels redrawn with the judge's error rates.

    Attributes:
        figure: what is measured, for people.
        measured: with the labels as they are.
        propagated: mean and central interval over the draws.
        reference: the value that the conclusion compares with: 1 for an enrichment, 0 for a rise.
        kept: share of draws on the same side of the reference as measured.
        n_draws: draws.
    """

    figure: str
    measured: float
    propagated: Interval
    reference: float
    kept: float
    n_draws: int


def propagate(
    labels: Labels,
    rates: Sequence[ErrorRates],
    measure: Measure,
    *,
    reference: float | Mapping[str, float],
    strata: Sequence[Iterable[int]] | None = None,
    n_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Robustness, ...]:
    """Any figures under labels as they are, and under ``n_draws`` that may be true.

    Args:
        labels: as they are.
        rates: how their source errs, per category; categories without rates are taken for right.
        measure: figures by name, from the features of each category.
        reference: the value that conclusions compare with; a mapping has one for each figure.
        strata: groups of features within which a category is equally common; None for one.
        n_draws: draws, each of which calls ``measure`` once.
        level: share of the draws inside of the interval.
        seed: of the draws.
        progress: show a progress bar.

    Returns:
        One record per figure, in the order of ``measure``.

    Raises:
        ValueError: for no draw, no rates, or rates of a category that the labels do not know.
    """
    if n_draws < 1:
        raise ValueError(f"Expected at least one draw, got {n_draws}.")
    measured = measure({name: labels.members(name) for name in labels.categories})
    drawn: dict[str, list[float]] = {name: [] for name in measured}
    draws = itertools.islice(draw_labels(labels, rates, strata=strata, seed=seed), n_draws)
    bar = {"desc": "redrawn labels", "unit": "draw", "leave": False, "disable": not progress}
    for categories in tqdm(draws, total=n_draws, **bar):
        for name, value in measure(categories).items():
            drawn[name].append(value)
    if not isinstance(reference, Mapping):
        reference = dict.fromkeys(measured, reference)
    return tuple(
        _robustness(name, value, drawn[name], reference[name], level)
        for name, value in measured.items()
    )


def propagate_composition(
    labels: Labels,
    rates: Sequence[ErrorRates],
    counts: Iterable[FeatureCounts],
    *,
    strata: Sequence[Iterable[int]] | None = None,
    n_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Robustness, ...]:
    """The enrichment of each category, and each less that of each later one, per segment.

    ``counts`` are from ``count_features``, one per segment. The rest is as in ``propagate``.
    """
    segments = list(counts)
    references: defaultdict[str, float] = defaultdict(lambda: 1.0)

    def measure(categories: Categories) -> dict[str, float]:
        figures: dict[str, float] = {}
        for segment in segments:
            shares = composition_of(segment, categories)
            found = {name: shares[name].enrichment for name in categories}
            figures |= {f"enrichment of {n}, {segment.segment}": x for n, x in found.items()}
            for one, other in itertools.combinations(found, 2):
                name = f"enrichment of {one} less that of {other}, {segment.segment}"
                figures[name] = found[one] - found[other]
                references[name] = 0.0
        return figures

    how: dict[str, Any] = {"strata": strata, "n_draws": n_draws, "level": level, "seed": seed}
    return propagate(labels, rates, measure, reference=references, **how)


def propagate_ablation(
    labels: Labels,
    rates: Sequence[ErrorRates],
    rise: Callable[[Sequence[int]], float],
    *,
    strata: Sequence[Iterable[int]] | None = None,
    n_draws: int = 20,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Robustness, ...]:
    """The rise of the loss without each category, and each rise less each later one.

    ``rise`` gives that of the mean loss when the steering of some features is zeroed. It runs the
    model, so it is for the caller to say on how many pairs; it is called once per category and
    draw. Few draws give a rough interval. The rest is as in ``propagate``.
    """

    def measure(categories: Categories) -> dict[str, float]:
        rises = {name: rise(features) for name, features in categories.items()}
        figures = {f"rise of the loss without {name}": value for name, value in rises.items()}
        for one, other in itertools.combinations(rises, 2):
            figures[f"rise without {one} less rise without {other}"] = rises[one] - rises[other]
        return figures

    how: dict[str, Any] = {"strata": strata, "n_draws": n_draws, "level": level, "seed": seed}
    return propagate(labels, rates, measure, reference=0.0, progress=progress, **how)


def strata_by_use(counts: FeatureCounts, n: int = 4) -> list[list[int]]:
    """The features that are never steered, and ``n`` groups of equal size of those that are.

    Args:
        counts: from ``count_features``.
        n: groups, from the least steered to the most; fewer where fewer features are steered.

    Raises:
        ValueError: for no group.
    """
    if n < 1:
        raise ValueError(f"Expected at least one group, got {n}.")
    order = counts.steered.argsort(stable=True).tolist()
    unused = int((counts.steered == 0).sum())
    used = order[unused:]
    ends = [round(len(used) * group / n) for group in range(n + 1)]
    groups = [order[:unused], *(used[a:b] for a, b in itertools.pairwise(ends))]
    return [sorted(group) for group in groups if group]


def draw_labels(
    labels: Labels,
    rates: Sequence[ErrorRates],
    *,
    strata: Sequence[Iterable[int]] | None = None,
    seed: int = 0,
) -> Iterator[dict[str, list[int]]]:
    """Labelings that may be true, without end: the features of each category.

    Labeled features in none of the ``strata`` are one more. The rest is as in ``propagate``.
    """
    import numpy as np

    unknown = [rate.category for rate in rates if rate.category not in labels.categories]
    if not rates or unknown:
        raise ValueError(
            f"Expected rates for categories among {list(labels.categories)}, got "
            f"{[rate.category for rate in rates]}."
        )
    features = np.array([label.feature for label in labels.features], dtype=np.int64)
    verdicts = {
        name: np.array([name in label.categories for label in labels.features], dtype=bool)
        for name in labels.categories
    }
    groups = None if strata is None else _groups(features, strata)
    by_name = {rate.category: rate for rate in rates}
    rng = np.random.default_rng(seed)
    while True:
        drawn = {}
        for name, judged in verdicts.items():
            truth = judged
            if name in by_name:
                chances = _chances(by_name[name], judged, groups, rng)
                truth = rng.random(len(features)) < chances
            drawn[name] = sorted(features[truth].tolist())
        yield drawn


def _chances(
    rates: ErrorRates, judged: np.ndarray[Any, Any], groups: Any, rng: np.random.Generator
) -> Any:
    """That each feature belongs to the category, given the verdict, for one draw of the rates."""
    import numpy as np

    if groups is None:
        confirmed = _draw(rates.both, rates.only_judged, rates.exact, rng)
        missed = _draw(rates.only_true, rates.neither, rates.exact, rng)
        return np.where(judged, confirmed, missed)
    sensitivity = _draw(rates.both, rates.only_true, rates.exact, rng)
    false_alarm = _draw(rates.only_judged, rates.neither, rates.exact, rng)
    chances = np.empty(len(judged))
    for group in groups:
        yes = judged[group]
        share = _draw(yes.sum(), len(yes) - yes.sum(), False, rng)
        # How common the category is here, from how often the judge sees it (Rogan and Gladen 1978).
        spread = sensitivity - false_alarm
        common = np.clip((share - false_alarm) / spread, 0, 1) if spread > 0 else 0.5
        said, unsaid = _posterior(common, sensitivity, false_alarm)
        chances[group] = np.where(yes, said, unsaid)
    return chances


def _posterior(common: float, sensitivity: float, false_alarm: float) -> tuple[float, float]:
    """That a feature belongs to a category, where the judge says yes and where it says no."""
    hit, alarm = sensitivity * common, false_alarm * (1 - common)
    miss, rejection = common - hit, 1 - common - alarm
    said = hit / (hit + alarm) if hit + alarm else 0.0
    unsaid = miss / (miss + rejection) if miss + rejection else 0.0
    return said, unsaid


def _draw(yes: float, no: float, exact: bool, rng: np.random.Generator) -> float:
    if exact:
        return yes / (yes + no) if yes + no else 0.0
    return float(rng.beta(yes + 0.5, no + 0.5))


def _groups(features: Any, strata: Sequence[Iterable[int]]) -> list[Any]:
    import numpy as np

    masks = [np.isin(features, list(stratum)) for stratum in strata]
    rest = ~np.any(masks, axis=0) if masks else np.ones(len(features), dtype=bool)
    return [mask for mask in [*masks, rest] if mask.any()]


def _robustness(
    name: str, measured: float, drawn: Sequence[float], reference: float, level: float
) -> Robustness:
    import numpy as np

    low, high = (float(np.quantile(drawn, (1 + side * level) / 2)) for side in (-1, 1))
    mean = Interval(float(np.mean(drawn)), low, high, level)
    kept = sum((value > reference) == (measured > reference) for value in drawn) / len(drawn)
    return Robustness(name, measured, mean, reference, kept, len(drawn))
