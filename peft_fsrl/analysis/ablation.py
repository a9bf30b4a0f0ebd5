"""The rise of the loss when the steering of a category of features is zeroed."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..records import Interval, Record
from ..steering import ablate_features
from . import statistics
from .buckets import length_groups, mean_lengths
from .preferences import PreferenceScores, score_preferences
from .session import Session
from .usage import Usage, require_chosen

_log = logging.getLogger(__name__)
# Random orders tried for one draw of equal mass; the nearest sum is taken.
_TRIES = 8


@dataclass(frozen=True)
class StratumEffect(Record):
    """The rise of the loss among pairs of similar answer length; see ``LengthBucket``."""

    shortest: float
    longest: float
    n: int
    rise: Interval


@dataclass(frozen=True)
class Ablation(Record):
    """The preference scores left when the steering of a category of features is zeroed.

    Intervals come from a paired bootstrap over preference pairs, that of the accuracy from the
    numbers of pairs that were gained and lost.

    Attributes:
        name: the category.
        features: its features.
        mass: share of ``||v||_1`` on the chosen answers that they carry.
        scores: with their steering zeroed.
        same_count: with as many random steered features zeroed, once per draw.
        same_mass: with random steered features of about the same steering mass zeroed.
        random_masses: the mass that each draw of ``same_mass`` reached.
        rise: of the mean SimPO loss over that of the trained model.
        accuracy_rise: of the accuracy, negative where it falls.
        margin_rise: of the mean margin.
        excess_count: ``rise`` less the mean rise of ``same_count``; None without draws.
        excess_mass: ``rise`` less the mean rise of ``same_mass``; None without draws.
        strata: by answer length.
    """

    name: str
    features: tuple[int, ...]
    mass: float
    scores: PreferenceScores
    same_count: tuple[PreferenceScores, ...]
    same_mass: tuple[PreferenceScores, ...]
    random_masses: tuple[float, ...]
    rise: Interval
    accuracy_rise: Interval
    margin_rise: Interval
    excess_count: Interval | None
    excess_mass: Interval | None
    strata: tuple[StratumEffect, ...]

    @property
    def rise_per_feature(self) -> float:
        """``rise`` over the number of features in the category: the loss per feature removed."""
        return self.rise.value / len(self.features)

    @property
    def control_loss(self) -> float:
        """Mean SimPO loss over the draws of as many random features.

        Raises:
            ValueError: if there is no draw.
        """
        if not self.same_count:
            raise ValueError(f"The ablation of {self.name!r} has no control.")
        return sum(score.loss for score in self.same_count) / len(self.same_count)


def measure_categories(
    session: Session,
    categories: Mapping[str, Sequence[int]],
    usage: Usage,
    *,
    trained: PreferenceScores | None = None,
    n_features: int | None = None,
    n_random: int = 5,
    n_strata: int = 3,
) -> tuple[Ablation, ...]:
    """Zero the steering of each category in turn, and of random features for comparison.

    Random features are drawn from those that the adapter steers and that no category holds, so that
    a control zeroes something that acts: as many of them as the category has, and as many as carry
    about its steering mass. Where there are no more than that, a control is all of them, once. One
    that has to weigh as much then falls short: ``random_masses`` says by how much.

    Args:
        session: its model has an FSRL adapter.
        categories: feature indices by category, best first.
        usage: the adapter's use of features on the chosen answers, from ``compute_usage``.
        trained: scores of the model as it is, if they are known.
        n_features: take only the first N of every category; None takes all.
        n_random: draws of each control.
        n_strata: number of strata of answer length, at most.

    Raises:
        ValueError: for no category, one with fewer features than asked for, or none, use on other
            tokens than the chosen answers', or fewer than two pairs.
        ImportError: without the ``audit`` extra.
    """
    statistics.require()
    sizes = {name: len(features) for name, features in categories.items()}
    if not sizes or min(sizes.values()) < (1 if n_features is None else max(1, n_features)):
        raise ValueError(
            f"Expected at least one category, each with {n_features or 'some'} features; got "
            f"{sizes}."
        )
    require_chosen(usage)

    def score_without(features: Sequence[int], name: str) -> PreferenceScores:
        with ablate_features(session.model, features):
            return score_preferences(session, f"without {name}")

    if trained is None:
        trained = score_without((), "nothing")
    held = {feature for features in categories.values() for feature in features}
    masses = {use.feature: use.mean_abs_steering for use in usage.features}
    pool = {feature: mass for feature, mass in sorted(masses.items()) if feature not in held}
    by_count, by_mass = random.Random(session.seed), random.Random(session.seed)
    ablations = []
    for name, features in categories.items():
        chosen = tuple(features[:n_features])
        target = sum(masses.get(feature, 0.0) for feature in set(chosen))
        draws = _draw_by_count(pool, len(chosen), n_random, by_count)
        matched = draw_by_mass(pool, target, n_random, by_mass)
        reached = [sum(pool[feature] for feature in draw) for draw in matched]
        if reached and max(reached) < 0.9 * target:
            _log.info(
                "%r carries %.0f %% of the steering mass, all features of no category only "
                "%.0f %%: its control of equal mass falls short.",
                name,
                100 * target / usage.l1,
                100 * max(reached) / usage.l1,
            )
        ablations.append(
            make_ablation(
                name,
                chosen,
                trained,
                score_without(chosen, name),
                [score_without(draw, "random features") for draw in draws],
                [score_without(d, "features of equal mass") if d else trained for d in matched],
                mass=_share(target, usage.l1),
                random_masses=[_share(mass, usage.l1) for mass in reached],
                n_strata=n_strata,
                seed=session.seed,
            )
        )
    return tuple(ablations)


def make_ablation(
    name: str,
    features: Sequence[int],
    trained: PreferenceScores,
    scores: PreferenceScores,
    same_count: Sequence[PreferenceScores],
    same_mass: Sequence[PreferenceScores],
    *,
    mass: float,
    random_masses: Sequence[float],
    n_strata: int = 3,
    seed: int = 0,
) -> Ablation:
    """The record of an ablation from the scores that were measured, with its intervals.

    Raises:
        ValueError: for fewer than two pairs.
        ImportError: without the ``audit`` extra.
    """

    def rise(mine: Sequence[float], others: Sequence[float]) -> Interval:
        return statistics.difference_interval(mine, others, seed=seed)

    def excess(draws: Sequence[PreferenceScores]) -> Interval | None:
        if not draws:
            return None
        means = [fmean(losses) for losses in zip(*(draw.losses for draw in draws), strict=True)]
        return rise(scores.losses, means)

    lengths = mean_lengths(trained)
    strata = tuple(
        StratumEffect(
            shortest=min(lengths[i] for i in rows),
            longest=max(lengths[i] for i in rows),
            n=len(rows),
            rise=rise([scores.losses[i] for i in rows], [trained.losses[i] for i in rows]),
        )
        for rows in length_groups(trained, n_strata)
    )
    return Ablation(
        name=name,
        features=tuple(features),
        mass=mass,
        scores=scores,
        same_count=tuple(same_count),
        same_mass=tuple(same_mass),
        random_masses=tuple(random_masses),
        rise=rise(scores.losses, trained.losses),
        accuracy_rise=statistics.share_difference_interval(
            [margin > 0 for margin in scores.margins], [margin > 0 for margin in trained.margins]
        ),
        margin_rise=rise(scores.margins, trained.margins),
        excess_count=excess(same_count),
        excess_mass=excess(same_mass),
        strata=strata,
    )


def draw_by_mass(
    pool: Mapping[int, float], target: float, n_draws: int, rng: random.Random
) -> list[list[int]]:
    """Random sets of features whose masses sum to about ``target``.

    Features are taken in a random order, each where it brings the sum nearer. A draw is the nearest
    of a few such sets.

    Args:
        pool: mass of each feature to draw from.
        target: target sum.
        n_draws: how many sets; one, of all features, where these carry no more than the target.
        rng: draws the orders.

    Returns:
        The sets; none from an empty pool.
    """
    if not pool or n_draws < 1:
        return []
    if sum(pool.values()) <= target:
        return [list(pool)]
    draws = []
    for _ in range(n_draws):
        tries = [_fill(pool, target, rng) for _ in range(_TRIES)]
        draws.append(min(tries, key=lambda pick: abs(sum(pool[f] for f in pick) - target)))
    return draws


def _fill(pool: Mapping[int, float], target: float, rng: random.Random) -> list[int]:
    picked, missing = [], target
    for feature in rng.sample(list(pool), len(pool)):
        if abs(missing - pool[feature]) < abs(missing):
            picked.append(feature)
            missing -= pool[feature]
    return picked


def _draw_by_count(
    pool: Mapping[int, float], n: int, n_draws: int, rng: random.Random
) -> list[list[int]]:
    if not pool or n_draws < 1:
        return []
    if n >= len(pool):
        return [list(pool)]
    return [rng.sample(list(pool), n) for _ in range(n_draws)]


def _share(mass: float, total: float) -> float:
    return mass / total if total else 0.0
