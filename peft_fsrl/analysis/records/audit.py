"""Everything about one adapter, and comparisons before and between."""

from __future__ import annotations

from dataclasses import dataclass

from ...records import Interval, Record
from ...training.coherence import VariantCoherence
from ..labels import Agreement, FeatureEvidence, FeatureLabel, Robustness
from .effects import Ablation, FeatureAblations, StaticDynamic
from .preferences import LengthBucket, PreferenceScores
from .texts import Generation
from .training import TrainingCurves
from .use import Composition, FeatureUse, RankFrequency, Usage


@dataclass(frozen=True)
class Summary(Record):
    """What a training run achieved and what carries it.

    Attributes:
        base: scores with the adapter disabled.
        trained: scores with it.
        usage: features steered on the evaluation texts.
        ablations: one per category.
        generations: sample texts before and after.
    """

    base: PreferenceScores
    trained: PreferenceScores
    usage: Usage
    ablations: tuple[Ablation, ...]
    generations: tuple[Generation, ...]


@dataclass(frozen=True)
class Setting(Record):
    """A name and a value, both for people."""

    name: str
    value: str


@dataclass(frozen=True)
class AdapterInfo(Record):
    """What was trained.

    Attributes:
        adapter: name or path of the adapter.
        base_model: name or path of the base model, if known.
        sae: reference of the SAE.
        neuronpedia_id: its id there, ``"model/source"``, if known.
        hook_name: where it reads, if known.
        fingerprint: SHA-256 of the SAE.
        weights: SHA-256 of the adapter's tensors.
        d_in: width of the activations.
        d_sae: number of features.
        n_parameters: trained parameters.
        settings: of the adapter and the training, in the order to show them.
    """

    adapter: str
    base_model: str | None
    sae: str
    neuronpedia_id: str | None
    hook_name: str | None
    fingerprint: str
    weights: str
    d_in: int
    d_sae: int
    n_parameters: int
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Finding(Record):
    """One line of the verdict.

    Attributes:
        question: for example ``"Does it beat the base model?"``.
        verdict: ``"yes"``, ``"no"`` or ``"unsure"``.
        answer: one sentence with its figures.
    """

    question: str
    verdict: str
    answer: str


@dataclass(frozen=True)
class FeatureCard(Record):
    """One feature as a reader of an audit sees it.

    Attributes:
        use: how the adapter uses it.
        label: what the labels say, if they say anything.
        evidence: contexts and tokens, if collected.
        url: its page on Neuronpedia, if the SAE has an id there.
    """

    use: FeatureUse
    label: FeatureLabel | None
    evidence: FeatureEvidence | None
    url: str | None


@dataclass(frozen=True)
class Audit(Record):
    """What alignment did to a model: the evidence of ``audit.json`` and ``audit.html``.

    Attributes:
        info: what was trained.
        dataset: name of the held-out data.
        n_pairs: preference pairs of it that were used.
        created: date, ISO 8601.
        versions: of the libraries.
        findings: the verdict, in the order to show it.
        base: scores of the base model.
        trained: scores with the adapter.
        gain: fall of the mean SimPO loss, paired bootstrap over pairs.
        buckets: scores by answer length.
        coherence: of each variant's answers.
        usages: use of features by segment, cut to the features with the most steering mass.
        n_steered: features that were steered at all, per entry of ``usages``.
        rank_frequencies: per segment.
        compositions: per segment; empty without labels.
        ablations: per category; empty without labels.
        single: single features zeroed, or None.
        static_dynamic: or None.
        generations: sample texts.
        promoted: features with the most promotion, most first.
        suppressed: features with the most suppression, most first.
        label_source: where labels come from, if there are any.
        agreements: how far the labels can be trusted, if somebody checked.
        robustness: whether the conclusions survive the labels' errors.
        curves: of the training, or None.
        notes: why a part is missing, by the name of its field.
    """

    info: AdapterInfo
    dataset: str
    n_pairs: int
    created: str
    versions: tuple[str, ...]
    findings: tuple[Finding, ...]
    base: PreferenceScores
    trained: PreferenceScores
    gain: Interval
    buckets: tuple[LengthBucket, ...]
    coherence: tuple[VariantCoherence, ...]
    usages: tuple[Usage, ...]
    n_steered: tuple[int, ...]
    rank_frequencies: tuple[RankFrequency, ...]
    compositions: tuple[Composition, ...]
    ablations: tuple[Ablation, ...]
    single: FeatureAblations | None
    static_dynamic: StaticDynamic | None
    generations: tuple[Generation, ...]
    promoted: tuple[FeatureCard, ...]
    suppressed: tuple[FeatureCard, ...]
    label_source: str | None
    agreements: tuple[Agreement, ...]
    robustness: tuple[Robustness, ...]
    curves: TrainingCurves | None
    notes: tuple[Setting, ...]

    def note(self, part: str) -> str:
        """Why a part is missing; empty if nobody said."""
        return {note.name: note.value for note in self.notes}.get(part, "")


@dataclass(frozen=True)
class SAEFit(Record):
    """How well an SAE fits a model's activations at one place.

    Attributes:
        hook: the place.
        model: whose activations.
        intended: whether it is where the SAE would be used.
        n_tokens: real tokens measured, special ones left out.
        fvu: fraction of variance unexplained.
        l0: active features per token.
        dead: share of features that were never active.
    """

    hook: str
    model: str
    intended: bool
    n_tokens: int
    fvu: float
    l0: float
    dead: float


@dataclass(frozen=True)
class Checkup(Record):
    """Whether an SAE fits a model and its data, before training.

    Attributes:
        sae: reference of the SAE.
        dataset: whose texts.
        fits: one entry per place.
        findings: what they say.
    """

    sae: str
    dataset: str
    fits: tuple[SAEFit, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class FeatureDifference(Record):
    """One feature as two adapters use it.

    Attributes:
        feature: index in the SAE.
        first: the first adapter's use, or None where it never steers it.
        second: the second's.
        cosine: between the two adapters' rows of weights and bias; None where one has no row.
        label: what it detects, if known.
    """

    feature: int
    first: FeatureUse | None
    second: FeatureUse | None
    cosine: float | None
    label: str | None


@dataclass(frozen=True)
class AdapterDifference(Record):
    """Two adapters on the same SAE, feature by feature, largest difference of mean ``v`` first.

    Attributes:
        first: name of the first.
        second: name of the second.
        dataset: whose chosen answers were read.
        n_tokens: tokens counted.
        first_l0: features steered per token.
        second_l0: of the second.
        overlap: share of the features steered by either that both steer.
        correlation: Spearman's, of the mean ``v`` over those features; None below three.
        features: one entry per feature, cut at some number.
    """

    first: str
    second: str
    dataset: str
    n_tokens: int
    first_l0: float
    second_l0: float
    overlap: float
    correlation: float | None
    features: tuple[FeatureDifference, ...]
