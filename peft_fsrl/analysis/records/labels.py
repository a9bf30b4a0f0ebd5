"""What features mean, who says so, and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass

from ...records import Interval, Record


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
        undecided: unlabelled features that the source was asked about without a usable answer.
    """

    source: str
    categories: tuple[str, ...]
    d_sae: int | None
    fingerprint: str | None
    features: tuple[FeatureLabel, ...]
    undecided: tuple[int, ...] = ()

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
class HeldOutContexts(Record):
    """Contexts of one feature from texts that no label was made from.

    Attributes:
        feature: index in the SAE.
        active: random contexts in which it is active.
        inactive: random contexts in which it is not.
    """

    feature: int
    active: tuple[Context, ...]
    inactive: tuple[Context, ...]


@dataclass(frozen=True)
class Detection(Record):
    """How well a description tells contexts with a feature from contexts without.

    Attributes:
        feature: index in the SAE.
        n_active: contexts shown in which it is active.
        n_inactive: contexts shown in which it is not.
        found: active ones that were called so.
        rejected: inactive ones that were called so.
        accuracy: balanced, ``(found / n_active + rejected / n_inactive) / 2``; chance is 0.5. None
            without a usable answer.
    """

    feature: int
    n_active: int
    n_inactive: int
    found: int
    rejected: int
    accuracy: float | None


@dataclass(frozen=True)
class Judgement(Record):
    """What a judge answered about one feature and one category.

    Attributes:
        feature: index in the SAE.
        category: the category.
        verdicts: one per sample; None for an answer that nobody could read.
        confidence: that the judge claims, from 0 to 1, mean over the samples that name one.
    """

    feature: int
    category: str
    verdicts: tuple[bool | None, ...]
    confidence: float | None

    @property
    def verdict(self) -> bool | None:
        """What most readable samples say; None for a tie or no readable one."""
        yes, no = self.verdicts.count(True), self.verdicts.count(False)
        return None if yes == no else yes > no


@dataclass(frozen=True)
class Spend(Record):
    """What a judge has cost so far.

    Attributes:
        prompts: that it was given, repeated ones counted once per call of ``ask``.
        cached: answered from the cache.
        answered: answered by the endpoint.
        refused: that the endpoint would not take, such as one that is too long.
        failed: given up.
        requests: sent to the endpoint, repetitions included.
        retried: of them, repetitions.
        prompt_tokens: as the endpoint reports them.
        completion_tokens: the same.
        unmetered: answers without such a report.
    """

    prompts: int
    cached: int
    answered: int
    refused: int
    failed: int
    requests: int
    retried: int
    prompt_tokens: int
    completion_tokens: int
    unmetered: int


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
