"""Every analysis of one adapter, stage by stage, as one record."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ..steering import scale_steering
from . import findings
from .ablation import ablate_categories
from .audit_info import describe_adapter, feature_url
from .buckets import compute_gain, score_by_length
from .coherence import compare_coherence
from .composition import compute_compositions
from .curves import load_training_curves
from .generations import compare_generations
from .parts import Parts, compute_digest, digest_model, digest_rows
from .preferences import score_preferences
from .records import (
    Ablation,
    Audit,
    Composition,
    FeatureAblations,
    FeatureCard,
    FeatureEvidence,
    Generation,
    Labels,
    PreferenceScores,
    RankFrequency,
    Setting,
    StaticDynamic,
    TrainingCurves,
    Usage,
    VariantCoherence,
    to_plain,
)
from .segments import only_layer
from .single import ablate_single_features
from .static_dynamic import compare_static_dynamic
from .usage import compute_rank_frequency, compute_usages

logger = logging.getLogger(__name__)
SEGMENTS = ("chosen", "prompt", "prompt_chosen", "prompt_rejected")
_PACKAGES = ("peft-fsrl", "torch", "transformers", "peft", "trl", "sae-lens")
_NO_LABELS = "The features have no labels: nobody said what they mean."
_NO_STEERING = "The adapter steers fewer than two features on the chosen answers."


@dataclass(frozen=True)
class AuditSettings:
    """How much of everything.

    Attributes:
        beta: SimPO's reward scale.
        gamma: SimPO's target margin.
        n_generations: prompts to continue, token by token.
        n_coherence: prompts to answer for the figures of coherence.
        max_new_tokens: length limit of an answer.
        n_random: draws of each random control of an ablation.
        n_single: single features to ablate.
        n_cards: features to show from near, promoted and suppressed.
        n_listed: features to keep in each table of use.
        n_draws: draws of the labels' errors.
        batch_size: pairs per forward pass.
        seed: of everything that is drawn.
    """

    beta: float = 10.0
    gamma: float = 5.0
    n_generations: int = 4
    n_coherence: int = 32
    max_new_tokens: int = 48
    n_random: int = 5
    n_single: int = 20
    n_cards: int = 8
    n_listed: int = 200
    n_draws: int = 200
    batch_size: int = 16
    seed: int = 0


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
        ValueError: for more than one FSRL layer, fewer than two rows, or labels of another SAE.
        ImportError: without the ``audit`` extra.
    """
    if len(dataset) < 2:
        raise ValueError(
            f"Expected at least two held-out preference pairs, found {len(dataset)} in "
            f"{dataset_name}."
        )
    stages = _Stages(
        model, dataset, tokenizer, labels, reference_labels, out, settings or AuditSettings(),
        show_progress,
    )  # fmt: skip
    return stages.assemble(adapter, dataset_name, run_folder)


class _Stages:
    """The stages of an audit, each made once."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        labels: Labels | None,
        reference: Labels | None,
        out: str | Path | None,
        settings: AuditSettings,
        show_progress: bool,
    ) -> None:
        self.model, self.dataset, self.tokenizer = model, dataset, tokenizer
        self.labels, self.reference, self.settings = labels, reference, settings
        self.show_progress = show_progress
        self.layer = only_layer(model)
        self.info = describe_adapter(model, self.layer)
        for each in (labels, reference):
            require_labels_of(each, self.info.fingerprint, self.info.d_sae)
        weights, base = digest_model(model, ".fsrl_adapter.")
        self.info = replace(self.info, weights=weights)
        inputs = {
            "version": importlib.metadata.version("peft-fsrl"),
            "adapter": [weights, to_plain(self.info)],
            "base": base,
            "dataset": digest_rows(dataset, ("prompt", "chosen", "rejected")),
            "seed": settings.seed,
            "preferences": [settings.beta, settings.gamma],
        }
        self.parts = Parts(None if out is None else Path(out) / "parts", inputs)
        self.notes: dict[str, str] = {}
        self.label_key = compute_digest(to_plain(labels))

    def bar(self, text: str) -> str | None:
        return text if self.show_progress else None

    @property
    def simpo(self) -> dict[str, Any]:
        each = self.settings
        return {"beta": each.beta, "gamma": each.gamma, "batch_size": each.batch_size}

    def run(self, function: Callable[..., Any], text: str, *inputs: Any, **options: Any) -> Any:
        """Call an analysis on the model and the data."""
        return function(
            self.model, self.dataset, self.tokenizer, *inputs, description=self.bar(text), **options
        )

    @cached_property
    def categories(self) -> dict[str, list[int]]:
        names = self.labels.categories if self.labels else ()
        found = {name: self.labels.members(name) for name in names if self.labels}
        return {name: members for name, members in found.items() if members}

    @cached_property
    def texts(self) -> dict[int, str]:
        """What the labels say about features, in a few words."""
        return {
            label.feature: label.description or ", ".join(label.categories)
            for label in (self.labels.features if self.labels else ())
            if label.description or label.categories
        }

    @cached_property
    def base(self) -> PreferenceScores:
        def score() -> PreferenceScores:
            with scale_steering(self.model, 0.0):
                return self.run(score_preferences, "base model", **self.simpo)

        return self.parts.make("scores_base", PreferenceScores, score)

    @cached_property
    def trained(self) -> PreferenceScores:
        def score() -> PreferenceScores:
            return self.run(score_preferences, "trained model", **self.simpo)

        return self.parts.make("scores_trained", PreferenceScores, score)

    @cached_property
    def usages(self) -> tuple[Usage, ...]:
        def count() -> tuple[Usage, ...]:
            size = self.settings.batch_size
            return self.run(compute_usages, "feature use", segments=SEGMENTS, batch_size=size)

        found = self.parts.make("usages", tuple[Usage, ...], count, SEGMENTS)
        return tuple(
            replace(
                usage,
                features=tuple(replace(u, label=self.texts.get(u.feature)) for u in usage.features),
            )
            for usage in found
        )

    @property
    def chosen(self) -> Usage:
        return self.usages[0]

    @cached_property
    def rank_frequencies(self) -> tuple[RankFrequency, ...]:
        return tuple(
            compute_rank_frequency(usage) for usage in self.usages if len(usage.features) > 1
        )

    def compositions(self) -> tuple[Composition, ...]:
        if not self.categories:
            return self.skip("compositions", _NO_LABELS)

        def compose() -> tuple[Composition, ...]:
            return self.run(
                compute_compositions,
                "composition",
                self.categories,
                segments=SEGMENTS,
                batch_size=self.settings.batch_size,
            )

        return self.parts.make("compositions", tuple[Composition, ...], compose, self.label_key)

    @cached_property
    def ablations(self) -> tuple[Ablation, ...]:
        if not self.categories:
            return self.skip("ablations", _NO_LABELS)

        def ablate() -> tuple[Ablation, ...]:
            return self.run(
                ablate_categories,
                "without",
                self.categories,
                self.chosen,
                trained=self.trained,
                n_random=self.settings.n_random,
                seed=self.settings.seed,
                **self.simpo,
            )

        key = (self.label_key, self.settings.n_random)
        return self.parts.make("ablations", tuple[Ablation, ...], ablate, *key)

    def single(self) -> FeatureAblations | None:
        n = self.settings.n_single
        if not n or len(self.chosen.features) < 2:
            self.skip("single", _NO_STEERING if n else "Not asked for.")
            return None

        def ablate() -> FeatureAblations:
            return self.run(
                ablate_single_features,
                "without feature",
                self.chosen,
                trained=self.trained,
                n_features=n,
                n_listed=n,
                seed=self.settings.seed,
                **self.simpo,
            )

        return self.parts.make("single", FeatureAblations, ablate, self.label_key, n)

    def static_dynamic(self) -> StaticDynamic | None:
        if len(self.chosen.features) < 2:
            self.skip("static_dynamic", _NO_STEERING)
            return None

        def compare() -> StaticDynamic:
            return self.run(
                compare_static_dynamic,
                "static and dynamic",
                self.chosen,
                base=self.base,
                trained=self.trained,
                seed=self.settings.seed,
                **self.simpo,
            )

        return self.parts.make("static_dynamic", StaticDynamic, compare)

    def prompts(self, n: int) -> list[str]:
        """Different prompts, in the order of the data."""
        found: dict[str, None] = {}
        for row in self.dataset:
            if len(found) == n:
                break
            found[row["prompt"]] = None
        return list(found)
