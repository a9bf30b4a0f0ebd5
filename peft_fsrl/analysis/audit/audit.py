"""Every analysis of one adapter, stage by stage, as one record."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..buckets import compute_gain, score_by_length
from ..curves import load_training_curves
from ..records import Audit, Labels, PreferenceScores, Setting, TrainingCurves, Usage
from ..usage import compute_rank_frequency
from ._stages import Stages
from .findings import judge_categories, judge_coherence, judge_gain, judge_labels
from .info import version_of
from .settings import AuditSettings
from .trust import compute_robustness

_PACKAGES = ("peft-fsrl", "torch", "transformers", "peft", "trl", "sae-lens")


def compute_audit(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    labels: Labels | None = None,
    reference_labels: Labels | None = None,
    out: str | Path | None = None,
    settings: AuditSettings | None = None,
    adapter: str = "adapter",
    dataset_name: str = "data",
    run_folder: str | Path | None = None,
    show_progress: bool = True,
) -> Audit:
    """Scores, use, composition, ablations, answers and verdicts for one adapter.

    Args:
        model: a generating model with one FSRL layer.
        dataset: held-out rows with the texts ``prompt``, ``chosen`` and ``rejected``; read often.
        tokenizer: the model's tokenizer.
        labels: what features mean; None leaves out what needs it.
        reference_labels: a source to check them against.
        out: folder in which each finished stage is kept, under ``parts``. A later call with the
            same adapter, base model, data, labels and settings takes it from there. None keeps
            nothing.
        settings: how much of everything; None for the defaults.
        adapter: name or path, shown in the record.
        dataset_name: shown in the record.
        run_folder: where the trainer left its state, for the curves of the training.
        show_progress: show progress bars.

    Raises:
        ValueError: for more than one FSRL layer, fewer than two rows, losses that are not finite,
            labels of another SAE, or a reference that is the labels themselves.
        OSError: if nothing can be written to ``out``.
        ImportError: without the ``audit`` extra.
    """
    if len(dataset) < 2:
        raise ValueError(
            f"Expected at least two held-out preference pairs, found {len(dataset)} in "
            f"{dataset_name}."
        )
    settings = settings or AuditSettings()
    stages = Stages(
        model, dataset, tokenizer, labels, reference_labels, out, settings, show_progress
    )
    base, trained = stages.base, stages.trained
    _require_finite(base, "base")
    _require_finite(trained, "trained")
    gain = compute_gain(base, trained, seed=settings.seed)
    ablations, compositions = stages.ablations, stages.compositions()
    coherence = stages.coherence()
    promoted, suppressed = stages.cards()
    robustness = compute_robustness(stages)
    return Audit(
        info=replace(stages.info, adapter=adapter),
        dataset=dataset_name,
        n_pairs=trained.n,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=tuple(_versions()),
        findings=(
            judge_gain(base, trained, gain),
            judge_coherence(coherence),
            judge_categories(base, trained, ablations),
            judge_labels(labels, stages.agreements, robustness, ablations),
        ),
        base=base,
        trained=trained,
        gain=gain,
        buckets=score_by_length(base, trained),
        coherence=coherence,
        usages=tuple(_cut(usage, settings.n_listed) for usage in stages.usages),
        n_steered=tuple(len(usage.features) for usage in stages.usages),
        rank_frequencies=tuple(
            compute_rank_frequency(usage) for usage in stages.usages if len(usage.features) > 1
        ),
        compositions=compositions,
        ablations=ablations,
        single=stages.single(),
        static_dynamic=stages.static_dynamic(),
        generations=stages.generations(),
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
            "pairs. Look at its weights, or try --dtype float32."
        )


def _cut(usage: Usage, n: int) -> Usage:
    return replace(usage, features=usage.features[:n])


def _curves(run_folder: str | Path | None, stages: Stages) -> TrainingCurves | None:
    if run_folder is None:
        stages.skip("curves", "Nobody said where the trainer left its state.")
        return None
    try:
        return load_training_curves(run_folder)
    except FileNotFoundError:
        stages.skip("curves", "The trainer's state file was not found beside the adapter.")
    except ValueError as error:
        stages.skip("curves", str(error))
    return None


def _versions() -> list[str]:
    return [f"{package} {version_of(package)}" for package in _PACKAGES]
