"""What features mean, who says so, and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Interval, Record


@dataclass(frozen=True)
class FeatureLabel(Record):
    """What one source says about one feature.

    Attributes:
        feature: index in the SAE.
        description: in words, if the source has any.
        categories: that it belongs to, such as ``"style"``; empty for none.
        quality: between 0 and 1, how well the label holds up (held-out detection accuracy, or
            agreement between judgements); None if nobody checked.
    """

    feature: int
    description: str | None
    categories: tuple[str, ...]
    quality: float | None


@dataclass(frozen=True)
class Labels(Record):
    """Labels of features from one source.

    Attributes:
        source: where they come from, for people.
        categories: all that a feature could have been given, also if none was.
        d_sae: number of features of the SAE that they are about, if known.
        fingerprint: of that SAE, if known.
        features: one entry per labelled feature; features without an entry are unlabelled.
    """

    source: str
    categories: tuple[str, ...]
    d_sae: int | None
    fingerprint: str | None
    features: tuple[FeatureLabel, ...]

    def members(self, category: str) -> list[int]:
        """The features of a category, ascending."""
        return sorted(label.feature for label in self.features if category in label.categories)


@dataclass(frozen=True)
class Context(Record):
    """A stretch of text on which a feature is active.

    Attributes:
        tokens: texts of its tokens.
        activations: of the feature at each.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True)
class FeatureEvidence(Record):
    """What can be seen of a feature without asking anybody.

    Attributes:
        feature: index in the SAE.
        density: share of tokens on which it is active.
        contexts: where it is most active, strongest first.
        promoted: tokens whose logits its decoder direction raises most.
        suppressed: tokens whose logits it lowers most.
    """

    feature: int
    density: float
    contexts: tuple[Context, ...]
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]


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
