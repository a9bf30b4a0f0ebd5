"""The measurements of an audit: each is made once, and read back when nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ...steering import scale_steering
from ...training.coherence import compare_coherence
from ..ablation import ablate_categories
from ..composition import compute_compositions
from ..generations import compare_generations
from ..labels import collect_evidence, compare_labels, require_fit
from ..preferences import score_preferences
from ..records import (
    Ablation,
    Agreement,
    Composition,
    FeatureAblations,
    FeatureCard,
    FeatureEvidence,
    Generation,
    Labels,
    PreferenceScores,
    StaticDynamic,
    Usage,
    VariantCoherence,
    to_plain,
)
from ..segments import only_layer
from ..session import Session
from ..single import ablate_single_features
from ..static_dynamic import compare_static_dynamic
from ..usage import compute_usages
from .info import describe_adapter, feature_url, version_of
from .parts import Parts, compute_digest, digest_model, digest_rows, digest_tokenizer
from .settings import AuditSettings

SEGMENTS = ("chosen", "prompt", "prompt_chosen", "prompt_rejected")
_NO_LABELS = "The features have no labels: nobody said what they mean."
_NO_CATEGORY = "The labels put no feature into a category that was asked for."
_NOT_ASKED = "Not asked for."
_NO_STEERING = "The adapter steers fewer than two features on the chosen answers."


class Stages:
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
        sae: dict[str, Any] = {"fingerprint": self.info.fingerprint, "d_sae": self.info.d_sae}
        for each in (labels, reference):
            if each is not None:
                require_fit(each, **sae)
        weights, base = digest_model(model, ".fsrl_adapter.")
        self.info = replace(self.info, weights=weights)
        inputs = {
            "version": version_of("peft-fsrl"),
            "adapter": [weights, to_plain(self.info)],
            "base": base,
            "tokenizer": digest_tokenizer(tokenizer),
            "dataset": digest_rows(dataset, ("prompt", "chosen", "rejected")),
            "seed": settings.seed,
            "preferences": [settings.beta, settings.gamma],
        }
        self.parts = Parts(None if out is None else Path(out) / "parts", inputs)
        self.notes: dict[str, str] = {}
        self.label_key = compute_digest([to_plain(labels), list(self.categories)])
        self.reference_key = compute_digest(to_plain(reference))
        # Seconds, and it may find that the two sources have nothing in common.
        self.agreements: tuple[Agreement, ...] = ()
        if labels is not None and reference is not None:
            if labels.features == reference.features:
                raise ValueError(
                    f"Expected a second source to check {labels.source} against, got the same "
                    "labels again: they agree with themselves, right or wrong. Leave it out, or "
                    "give labels that were made independently."
                )
            shared = [name for name in self.categories if name in reference.categories]
            self.agreements = compare_labels(labels, reference, shared, seed=settings.seed)

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
        if self.labels is None:
            return {}
        names, wanted = self.labels.categories, self.settings.categories
        unknown = sorted(set(wanted or ()) - set(names))
        if unknown:
            raise ValueError(
                f"Expected categories that the labels know, {list(names)}; got {unknown}."
            )
        found = {name: self.labels.members(name) for name in wanted or names}
        return {name: members for name, members in found.items() if members}

    @property
    def no_category(self) -> str:
        return _NO_LABELS if self.labels is None else _NO_CATEGORY

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

    def compositions(self) -> tuple[Composition, ...]:
        if not self.categories:
            return self.skip("compositions", self.no_category)

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
            return self.skip("ablations", self.no_category)

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
            self.skip("single", _NO_STEERING if n else _NOT_ASKED)
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
        found = dict.fromkeys(row["prompt"] for row in self.dataset)
        return list(found)[:n]

    def coherence(self) -> tuple[VariantCoherence, ...]:
        n = min(self.settings.n_coherence, len(self.dataset))
        prompts = [self.dataset[row]["prompt"] for row in range(n)]
        if not prompts:
            return self.skip("coherence", _NOT_ASKED)

        def sample() -> tuple[VariantCoherence, ...]:
            return compare_coherence(
                self.model,
                prompts,
                self.tokenizer,
                without=self.categories,
                batch_size=self.settings.batch_size,
                **self.sampling,
            )

        kind, key = tuple[VariantCoherence, ...], (self.label_key, len(prompts), self.sampling)
        return self.parts.make("coherence", kind, sample, *key)

    def generations(self) -> tuple[Generation, ...]:
        prompts = self.prompts(self.settings.n_generations)
        if not prompts:
            return self.skip("generations", _NOT_ASKED)

        def sample() -> tuple[Generation, ...]:
            return compare_generations(
                self.model, prompts, self.tokenizer, without=self.categories, **self.sampling
            )

        key = (self.label_key, len(prompts), self.sampling)
        return self.parts.make("generations", tuple[Generation, ...], sample, *key)

    @property
    def sampling(self) -> dict[str, Any]:
        return {"max_new_tokens": self.settings.max_new_tokens, "seed": self.settings.seed}

    def cards(self) -> tuple[tuple[FeatureCard, ...], tuple[FeatureCard, ...]]:
        """The features most promoted, and those most suppressed."""
        uses, n = self.chosen.features, self.settings.n_cards
        ordered = sorted(uses, key=lambda use: -use.mean_steering)
        promoted = [use for use in ordered if use.mean_steering > 0][:n]
        suppressed = [use for use in reversed(ordered) if use.mean_steering < 0][:n]
        wanted = [use.feature for use in (*promoted, *suppressed)]
        if not wanted:
            self.skip("promoted", _NOT_ASKED if uses else _NO_STEERING)
            return (), ()

        def look() -> tuple[FeatureEvidence, ...]:
            # Nothing is held out here: nobody tests descriptions on the rest.
            session = Session(
                self.model,
                self.tokenizer,
                self.dataset,
                batch_size=self.settings.batch_size,
                progress=self.show_progress,
            )
            return collect_evidence(session, wanted, n_contexts=3, held_out=0.0)

        found = self.parts.make("evidence", tuple[FeatureEvidence, ...], look, wanted)
        evidence = {each.feature: each for each in found}
        labels = {each.feature: each for each in (self.labels.features if self.labels else ())}

        def card(use: Any) -> FeatureCard:
            feature = use.feature
            url = feature_url(self.info.neuronpedia_id, feature)
            return FeatureCard(use, labels.get(feature), evidence.get(feature), url)

        return tuple(map(card, promoted)), tuple(map(card, suppressed))

    def skip(self, part: str, why: str) -> tuple[Any, ...]:
        """Note why a part is missing."""
        self.notes[part] = why
        return ()
