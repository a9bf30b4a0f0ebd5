"""Which features an adapter uses."""

from __future__ import annotations

from dataclasses import dataclass

from ...records import Interval, Record


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


@dataclass(frozen=True)
class CategoryShare(Record):
    """A category's share among the steered features against its share among the active ones.

    Both count (token, feature) pairs: a feature counts wherever it is steered, or active.

    Attributes:
        category: its name; ``"other"`` for features in no category.
        n_features: features of the SAE in it.
        steered: pairs of the category that are steered.
        n_steered: all steered pairs.
        active: pairs of the category that are active in the SAE.
        n_active: all active pairs.
        steered_share: ``steered / n_steered``.
        active_share: ``active / n_active``.
        enrichment: the first over the second.
    """

    category: str
    n_features: int
    steered: int
    n_steered: int
    active: int
    n_active: int
    steered_share: Interval
    active_share: Interval
    enrichment: Interval


@dataclass(frozen=True)
class Composition(Record):
    """What kinds of features an adapter steers; intervals are bootstrapped over examples.

    Attributes:
        segment: the tokens that count; see ``Usage``.
        n_tokens: real tokens.
        n_examples: texts that they come from.
        shares: one entry per category, ``"other"`` last.
    """

    segment: str
    n_tokens: int
    n_examples: int
    shares: tuple[CategoryShare, ...]
