"""What steering does to the preference loss."""

from __future__ import annotations

from dataclasses import dataclass

from ...records import Interval, Record
from .preferences import PreferenceScores


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
    def control_loss(self) -> float:
        """Mean SimPO loss over the draws of as many random features.

        Raises:
            ValueError: if there is no draw.
        """
        if not self.same_count:
            raise ValueError(f"The ablation of {self.name!r} has no control.")
        return sum(score.loss for score in self.same_count) / len(self.same_count)


@dataclass(frozen=True)
class FeatureAblation(Record):
    """What zeroing the steering of one feature does to the SimPO loss.

    Attributes:
        feature: index in the SAE.
        rise: of the mean loss, measured; None where only the estimate was made.
        first_order: estimate of the rise, ``-sum(dloss/dv * v)``, mean over pairs.
        label: what the feature detects, if known.
    """

    feature: int
    rise: Interval | None
    first_order: float
    label: str | None = None


@dataclass(frozen=True)
class FeatureAblations(Record):
    """Single features zeroed one at a time, largest first-order estimate first.

    Attributes:
        n_pairs: preference pairs.
        features: one entry per feature.
        rank_correlation: Spearman's, between estimate and measured rise; None below three.
        slope: of the measured rises on the estimates, by least squares through zero; None if none.
    """

    n_pairs: int
    features: tuple[FeatureAblation, ...]
    rank_correlation: float | None
    slope: float | None


@dataclass(frozen=True)
class SteeringLevel(Record):
    """Preference scores with steering limited to some features.

    Attributes:
        share: of the SAE's features that may be steered, per token or as one fixed set.
        n_features: that many.
        l0: features steered per answer token then.
        loss: mean SimPO loss.
        accuracy: preference accuracy.
        margin: mean reward margin.
    """

    share: float
    n_features: int
    l0: float
    loss: Interval
    accuracy: Interval
    margin: Interval


@dataclass(frozen=True)
class StaticDynamic(Record):
    """Few features chosen anew at each token, or once for all, against the policy (figure 4).

    Attributes:
        d_sae: features of the SAE.
        base_loss: mean SimPO loss without steering.
        learned: the adapter as it was trained, at its own l0.
        dynamic: only the largest ``|v|`` of each token.
        static: only a fixed set, those with the most steering mass.
    """

    d_sae: int
    base_loss: float
    learned: SteeringLevel
    dynamic: tuple[SteeringLevel, ...]
    static: tuple[SteeringLevel, ...]
