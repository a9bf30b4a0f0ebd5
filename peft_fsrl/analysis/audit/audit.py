"""Every analysis of one adapter, stage by stage, as one record."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, replace
from pathlib import Path

from ...records import Interval, Record
from ...training.coherence import VariantCoherence
from ..ablation import Ablation
from ..buckets import LengthBucket, compute_gain, score_by_length
from ..composition import Composition
from ..concentration import Concentration, Magnitudes, compute_concentration
from ..content import digest_json
from ..curves import TrainingCurves, load_training_curves
from ..data import Mirror
from ..findings import (
    Finding,
    judge_ablations,
    judge_coherence,
    judge_gain,
    judge_labels,
    judge_mirror,
)
from ..generations import Generation
from ..labels import Agreement, Labels, Robustness
from ..preferences import PreferenceScores
from ..session import Session
from ..single import FeatureAblations
from ..static_dynamic import StaticDynamic
from ..usage import RankFrequency, Usage, compute_rank_frequency
from .info import AdapterInfo, Setting, version_of
from .stages import AuditSettings, FeatureCard, Stages

_PACKAGES = ("peft-fsrl", "torch", "transformers", "peft", "trl", "sae-lens")


@dataclass(frozen=True)
class Audit(Record):
    """What alignment did to a model: the evidence of ``audit.json`` and ``audit.html``.

    Attributes:
        info: what was trained.
        dataset: name of the held-out data.
        n_pairs: preference pairs of it that were used.
        created: date, ISO 8601.
        versions: of the libraries.
        inputs: SHA-256 of each thing that the figures depend on: adapter, SAE, base model (tensors
            and settings), tokenizer, data, labels, settings of the audit, versions.
        content: SHA-256 of ``inputs``: the same for two audits of the same.
        findings: the verdict, in the order to show it.
        base: scores of the base model.
        trained: scores with the adapter.
        gain: fall of the mean SimPO loss, paired bootstrap over pairs.
        buckets: scores by answer length.
        coherence: of each variant's answers.
        usages: use of features by segment, cut to the features with the most steering mass.
        n_steered: features that were steered at all, per entry of ``usages``.
        rank_frequencies: per segment.
        concentration: on how few features the steering of the first segment lies, or None.
        compositions: per segment; empty without labels.
        magnitudes: how strongly each category is steered where it is; empty without labels.
        ablations: per category; empty without labels.
        single: single features zeroed, or None.
        static_dynamic: or None.
        mirror: how much of the steering the data predict, or None.
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
    inputs: tuple[Setting, ...]
    content: str
    findings: tuple[Finding, ...]
    base: PreferenceScores
    trained: PreferenceScores
    gain: Interval
    buckets: tuple[LengthBucket, ...]
    coherence: tuple[VariantCoherence, ...]
    usages: tuple[Usage, ...]
    n_steered: tuple[int, ...]
    rank_frequencies: tuple[RankFrequency, ...]
    concentration: Concentration | None
    compositions: tuple[Composition, ...]
    magnitudes: tuple[Magnitudes, ...]
    ablations: tuple[Ablation, ...]
    single: FeatureAblations | None
    static_dynamic: StaticDynamic | None
    mirror: Mirror | None
    generations: tuple[Generation, ...]
    promoted: tuple[FeatureCard, ...]
    suppressed: tuple[FeatureCard, ...]
    label_source: str | None
    agreements: tuple[Agreement, ...]
    robustness: tuple[Robustness, ...]
    curves: TrainingCurves | None
    notes: tuple[Setting, ...]

    def note(self, part: str) -> str:
        """Why a part is missing; empty if no reason was given."""
        return {note.name: note.value for note in self.notes}.get(part, "")


def compute_audit(
    session: Session,
    *,
    labels: Labels | None = None,
    reference_labels: Labels | None = None,
    out: str | Path | None = None,
    settings: AuditSettings | None = None,
    adapter: str = "adapter",
    dataset_name: str = "data",
    run_folder: str | Path | None = None,
) -> Audit:
    """Scores, use, composition, ablations, answers and verdicts for one adapter.

    Args:
        session: its model generates and has one FSRL layer; its data are held out.
        labels: what features mean; None leaves out what needs it.
        reference_labels: a source to check them against.
        out: folder in which each finished stage is kept, under ``parts``. A later call on the same
            content (adapter, SAE, base model, tokenizer, data, labels, settings) takes it from
            there. None keeps nothing.
        settings: how much of everything; None for the defaults.
        adapter: name or path, shown in the record.
        dataset_name: shown in the record.
        run_folder: where the trainer left its state, for the curves of the training.

    Raises:
        ValueError: for more than one FSRL layer, fewer than two rows, losses that are not finite,
            labels of another SAE, or a reference that is the labels themselves.
        OSError: if nothing can be written to ``out``.
        ImportError: without the ``audit`` extra.
    """
    if len(session.rows) < 2:
        raise ValueError(
            f"Expected at least two held-out preference pairs, found {len(session.rows)} in "
            f"{dataset_name}."
        )
    settings = settings or AuditSettings()
    stages = Stages(session, labels, reference_labels, out, settings, adapter)
    base, trained = stages.base, stages.trained
    _require_finite(base, "base")
    _require_finite(trained, "trained")
    gain = compute_gain(base, trained, seed=session.seed)
    promoted, suppressed = stages.cards()
    robustness = stages.robustness()
    versions = tuple(f"{package} {version_of(package)}" for package in _PACKAGES)
    inputs = {**stages.digests, "versions": digest_json(versions)}
    return Audit(
        info=stages.info,
        dataset=dataset_name,
        n_pairs=trained.n,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions,
        inputs=tuple(Setting(name, digest) for name, digest in inputs.items()),
        content=digest_json(inputs),
        findings=(
            judge_gain(base, trained, gain),
            judge_coherence(stages.coherence),
            judge_ablations(base, trained, stages.ablations),
            judge_labels(labels, stages.agreements, robustness, stages.ablations),
            judge_mirror(stages.mirror),
        ),
        base=base,
        trained=trained,
        gain=gain,
        buckets=score_by_length(base, trained),
        coherence=stages.coherence,
        usages=tuple(
            replace(usage, features=usage.features[: settings.n_listed]) for usage in stages.usages
        ),
        n_steered=tuple(len(usage.features) for usage in stages.usages),
        rank_frequencies=tuple(
            compute_rank_frequency(usage) for usage in stages.usages if len(usage.features) > 1
        ),
        concentration=(
            compute_concentration(stages.chosen, stages.info.d_sae, stages.categories)
            if stages.chosen.features
            else None
        ),
        compositions=stages.compositions,
        magnitudes=stages.magnitudes,
        ablations=stages.ablations,
        single=stages.single,
        static_dynamic=stages.static_dynamic,
        mirror=stages.mirror,
        generations=stages.generations,
        promoted=promoted,
        suppressed=suppressed,
        label_source=labels.source if labels else None,
        agreements=stages.agreements,
        robustness=robustness,
        curves=_curves(run_folder, stages),
        notes=tuple(Setting(name, why) for name, why in stages.notes.items()),
    )


def _require_finite(scores: PreferenceScores, name: str) -> None:
    bad = sum(not math.isfinite(loss) for loss in scores.losses)
    if bad:
        raise ValueError(
            f"Expected finite losses of the {name} model, found nan or inf on {bad} of {scores.n} "
            "pairs. Check its weights, or try --dtype float32."
        )


def _curves(run_folder: str | Path | None, stages: Stages) -> TrainingCurves | None:
    if run_folder is None:
        stages.skip("curves", "No training run folder given.")
        return None
    try:
        return load_training_curves(run_folder)
    except FileNotFoundError:
        stages.skip("curves", "The trainer's state file was not found beside the adapter.")
    except ValueError as error:
        stages.skip("curves", str(error))
    return None
