"""The verdicts on an audit's first page, and their limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..records import Interval, Record
from ..training.coherence import Coherence, VariantCoherence
from .ablation import Ablation
from .data import Mirror
from .labels import Agreement, Labels, Robustness
from .preferences import PreferenceScores

# Below so many pairs one verdict of chance in twenty cannot be ruled out: even if all pairs agree,
# 2 / 2 ** 5 is more.
ENOUGH_PAIRS = 6
# Perplexity of the trained model's answers under the base model, over that of the base model's own
# answers: language as before up to the first, something else above the second.
COHERENT_PERPLEXITY, INCOHERENT_PERPLEXITY = 1.5, 3.0
# Rise of the share of repeated 4-grams, likewise.
COHERENT_REPETITION, INCOHERENT_REPETITION = 0.05, 0.2
# A category carries the gain if zeroing it costs this share of it.
CARRIES = 0.5
# A random control has the steering mass of a category if it reaches this share of it.
SAME_MASS = 0.9
# Share of redrawn labels under which conclusions must keep their side.
ROBUST, FRAGILE = 0.95, 0.8
# So many draws at least, or a share of 95 % cannot be told from all.
ENOUGH_DRAWS = 20
# Without redrawn labels, agreement with a reference.
TRUSTED_MCC, DISTRUSTED_MCC = 0.7, 0.3
# Steering mirrors the data if more than this share of its mass is explained by them.
EXPLAINED = 0.5


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


def judge_gain(base: PreferenceScores, trained: PreferenceScores, gain: Interval) -> Finding:
    """Yes if the interval of the loss's fall lies above zero, no if below, over enough pairs."""
    verdict = "yes" if gain.low > 0 else "no" if gain.high < 0 else "unsure"
    few = trained.n < ENOUGH_PAIRS
    warning = f" Too few pairs: give at least {ENOUGH_PAIRS}." if few else ""
    return Finding(
        "Does it beat the base model?",
        "unsure" if few else verdict,
        f"The SimPO loss on {trained.n:,} held-out pairs goes from {base.loss:.2f} to "
        f"{trained.loss:.2f}, a fall of {_interval(gain, '.2f')}; accuracy from "
        f"{base.accuracy:.1%} to {trained.accuracy:.1%}.{warning}",
    )


def judge_coherence(variants: Sequence[VariantCoherence]) -> Finding:
    """By perplexity and repetition of the trained model's answers against the base model's own."""
    question = "Are its outputs still fluent?"
    found = {variant.name: variant.coherence for variant in variants}
    if not {"base", "trained"} <= found.keys():
        return Finding(question, "unsure", "No answers were sampled.")
    base, trained = found["base"], found["trained"]
    ratio, rise = _ratio(trained, base), trained.repetition - base.repetition
    # Written so that nan counts as incoherent.
    if not (ratio <= INCOHERENT_PERPLEXITY and rise <= INCOHERENT_REPETITION):
        verdict = "no"
    elif ratio <= COHERENT_PERPLEXITY and rise <= COHERENT_REPETITION:
        verdict = "yes"
    else:
        verdict = "unsure"
    return Finding(
        question,
        verdict,
        f"Perplexity of {trained.n} sampled answers under the base model: "
        f"{trained.perplexity:.3g}, {ratio:.2g} times that of the base model's own (fluent up "
        f"to {COHERENT_PERPLEXITY:g}, not above {INCOHERENT_PERPLEXITY:g}). Repeated 4-grams: "
        f"{trained.repetition:.1%} against {base.repetition:.1%}.",
    )


def judge_ablations(
    base: PreferenceScores, trained: PreferenceScores, ablations: Sequence[Ablation]
) -> Finding:
    """Yes if zeroing a category costs much of the gain, and more than matched random features."""
    question = "Does a category of features carry it?"
    gain = base.loss - trained.loss
    if not ablations:
        return Finding(question, "unsure", "No feature has a category.")
    if gain <= 0:
        return Finding(question, "unsure", "There is no gain to explain.")
    if trained.n < ENOUGH_PAIRS:
        return Finding(question, "unsure", f"{trained.n} pairs are too few.")
    ordered = sorted(ablations, key=lambda ablation: -ablation.rise.value)
    carrying = [a for a in ordered if a.rise.low > CARRIES * gain and _beats_random(a)]
    touching = [a for a in ordered if a.rise.low > 0 and _beats_random(a)]
    # Of a category beside which nothing is steered nobody knows what other features would cost.
    alone = [a for a in ordered if a.rise.low > 0 and _control(a)[0] is None]
    verdict = "yes" if carrying else "unsure" if touching or alone else "no"
    shown = ordered[:3]
    return Finding(question, verdict, " ".join(_describe(a, gain) for a in shown))


def judge_labels(
    labels: Labels | None,
    agreements: Sequence[Agreement],
    robustness: Sequence[Robustness],
    ablations: Sequence[Ablation] = (),
) -> Finding:
    """By what redrawn labels leave of the conclusions, or else by agreement with a reference.

    Args:
        labels: if there are any.
        agreements: with a reference.
        robustness: figures under redrawn labels.
        ablations: what the conclusions are about: the category whose loss costs most counts, and
            figures of others do not.
    """
    question = "Can the labels be trusted?"
    if labels is None:
        return Finding(question, "unsure", "There are no labels.")
    if not agreements and not robustness:
        qualities = [label.quality for label in labels.features if label.quality is not None]
        text = f"These labels ({labels.source}) have not been compared with a second source."
        if qualities:
            mean = sum(qualities) / len(qualities)
            text += f" Their own quality scores average {mean:.2f} over {len(qualities):,} labels."
        return Finding(question, "unsure", text)
    parts = [
        f"{a.category}: MCC {_interval(a.mcc, '.2f')} against {a.reference}" for a in agreements
    ]
    if robustness:
        robustness = _concluded(robustness, ablations)
        kept = min(each.kept for each in robustness)
        weakest = min(robustness, key=lambda each: each.kept)
        enough = min(each.n_draws for each in robustness) >= ENOUGH_DRAWS
        sure = kept >= ROBUST and enough
        verdict = "yes" if sure else "unsure" if kept >= FRAGILE else "no"
        whose = "these" if agreements else "the given"
        parts.append(
            f"with labels redrawn by {whose} error rates, the conclusions about what carries the "
            f"gain hold in at least {kept:.0%} of {weakest.n_draws} draws (lowest: "
            f"{weakest.figure})"
        )
    else:
        lowest = min(agreement.mcc.value for agreement in agreements)
        verdict = "yes" if lowest >= TRUSTED_MCC else "unsure" if lowest >= DISTRUSTED_MCC else "no"
    text = "; ".join(parts)
    return Finding(question, verdict, f"{text[:1].upper()}{text[1:]}.")


def judge_mirror(mirror: Mirror | None) -> Finding:
    """Yes if most of the steering is explained; no if no more than by chance, or against it."""
    question = "Does it mirror its data?"
    if mirror is None or mirror.explained is None or mirror.cosine is None:
        return Finding(question, "unsure", "There are too few pairs, or there is no steering.")
    explained, cosine = mirror.explained, mirror.cosine
    if explained.low > max(EXPLAINED, mirror.by_chance) and cosine.low > 0:
        verdict = "yes"
    elif explained.high <= mirror.by_chance or cosine.high < 0:
        verdict = "no"
    else:
        verdict = "unsure"
    unknown = mirror.unexplained
    text = (
        f"{explained.value:.0%} [{explained.low:.0%}, {explained.high:.0%}] of the steering is on "
        "features that tell chosen from rejected answers in the direction in which they are "
        f"steered ({mirror.by_chance:.0%} by chance); cosine with the data's contrast "
        f"{_interval(cosine, '.2f')}"
    )
    if mirror.correlation is not None:
        text += f", rank correlation {_interval(mirror.correlation, '.2f')}"
    if unknown:
        most = unknown[0]
        known = f" ({most.label})" if most.label else ""
        text += f". Largest unexplained: feature {most.feature}{known}, {most.share:.1%}"
    return Finding(question, verdict, f"{text}.")


def _concluded(
    robustness: Sequence[Robustness], ablations: Sequence[Ablation]
) -> Sequence[Robustness]:
    """The figures about zeroing the category that costs most; all where there is none."""
    top = max(ablations, key=lambda ablation: ablation.rise.value, default=None)
    about = f"without {top.name}" if top else ""
    found = [each for each in robustness if top and about in each.figure]
    return found or robustness


def _ratio(trained: Coherence, base: Coherence) -> float:
    return trained.perplexity / base.perplexity


def _control(ablation: Ablation) -> tuple[Interval | None, str]:
    """What the rise has above random features, and which: of the same mass where there are any."""
    reached = max(ablation.random_masses, default=0.0)
    if ablation.excess_mass is not None and reached >= SAME_MASS * ablation.mass:
        return ablation.excess_mass, "random features of the same steering mass"
    if ablation.excess_count is not None:
        return ablation.excess_count, "as many random features"
    return None, "random features"


def _beats_random(ablation: Ablation) -> bool:
    excess, _ = _control(ablation)
    return excess is not None and excess.low > 0


def _describe(ablation: Ablation, gain: float) -> str:
    excess, which = _control(ablation)
    text = (
        f"Without {ablation.name} ({ablation.mass:.0%} of the steering) the loss rises by "
        f"{_interval(ablation.rise, 'z.2f')}, {ablation.rise.value / gain:z.0%} of the gain"
    )
    if excess is None:
        return f"{text}; there are no other features to compare with."
    return f"{text}, {_interval(excess, '+z.2f')} above {which}."


def _interval(interval: Interval, style: str) -> str:
    return f"{interval.value:{style}} [{interval.low:{style}}, {interval.high:{style}}]"
