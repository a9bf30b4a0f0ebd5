"""The stages of an audit: each is computed once and reused while its inputs are unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...records import Record, to_plain
from ...steering import ablate_features
from ...training.coherence import VariantCoherence, compare_coherence
from ..ablation import Ablation, measure_categories
from ..composition import Composition, compute_compositions, count_features
from ..concentration import Magnitudes, measure_magnitudes
from ..content import digest_adapter, digest_base, digest_json, digest_tokenizer
from ..data import ENOUGH_PAIRS, Mirror, compute_mirror
from ..generations import Generation, compare_generations
from ..labels import (
    Agreement,
    ErrorRates,
    FeatureEvidence,
    FeatureLabel,
    Labels,
    Robustness,
    collect_evidence,
    compare_labels,
    error_rates,
    error_rates_for_mcc,
    propagate_ablation,
    propagate_composition,
    require_fit,
)
from ..parts import Parts
from ..preferences import PreferenceScores, score_preferences
from ..session import Session
from ..single import FeatureAblations, measure_features
from ..static_dynamic import StaticDynamic, compare_static_dynamic
from ..usage import FeatureUse, Usage, compute_usages
from .info import describe_adapter, feature_url, short_texts, version_of

SEGMENTS = ("chosen", "prompt", "prompt_chosen", "prompt_rejected")
# An ablation under redrawn labels runs the model: fewer draws, on fewer pairs.
_DRAWS_PER_ABLATION = 10
_PAIRS = 100
_NO_LABELS = "No labels given: the features have no names."
_NO_CATEGORY = "The labels put no feature into a category that was asked for."
_NOT_ASKED = "Not asked for."
_FEW_PAIRS = f"Fewer than {ENOUGH_PAIRS} pairs do not say what data prefer."
_NO_STEERING = "The adapter steers fewer than two features on the chosen answers."


_AT_LEAST_ONE = ("max_new_tokens", "n_listed")
_NONE_OR_MORE = ("n_generations", "n_coherence", "n_random", "n_single", "n_cards", "n_draws")


@dataclass(frozen=True)
class AuditSettings:
    """Amounts of work and of output.

    Attributes:
        categories: those of the labels to look at; None for all.
        n_generations: prompts to continue, token by token.
        n_coherence: prompts to answer for the figures of coherence.
        max_new_tokens: length limit of an answer.
        n_random: draws of each random control of an ablation.
        n_single: single features to ablate.
        n_cards: features to show from near, promoted and suppressed.
        n_listed: features to keep in each table of use.
        n_draws: draws of the labels' errors.
        label_mcc: Matthews correlation of the labels' source with the truth, where it is known from
            elsewhere and there is no reference to find it by; one for all categories, or one for
            each that is to be redrawn. None does not redraw the labels then.

    Raises:
        ValueError: for an amount out of range.
    """

    categories: tuple[str, ...] | None = None
    n_generations: int = 4
    n_coherence: int = 32
    max_new_tokens: int = 48
    n_random: int = 5
    n_single: int = 20
    n_cards: int = 8
    n_listed: int = 200
    n_draws: int = 200
    label_mcc: float | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for least, names in ((1, _AT_LEAST_ONE), (0, _NONE_OR_MORE)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(
                        f"Expected {name} of {least} or more, got {getattr(self, name)}."
                    )
        known = self.label_mcc.values() if isinstance(self.label_mcc, Mapping) else [self.label_mcc]
        for mcc in known:
            if mcc is not None and not 0 <= mcc <= 1:
                raise ValueError(f"Expected a label_mcc from 0 to 1, got {mcc}.")


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


class Stages:
    """The stages of an audit, each computed once."""

    def __init__(
        self,
        session: Session,
        labels: Labels | None,
        reference: Labels | None,
        out: str | Path | None,
        settings: AuditSettings,
        adapter: str,
    ) -> None:
        self.session, self.settings = session, settings
        self.labels, self.reference = labels, reference
        self.weights = digest_adapter(session.model)
        self.info = describe_adapter(session.model, adapter, self.weights)
        for each in (labels, reference):
            if each is not None:
                require_fit(each, fingerprint=self.info.fingerprint, d_sae=self.info.d_sae)
        run = [session.seed, session.beta, session.gamma, session.max_length]
        inputs = {
            "version": version_of("peft-fsrl"),
            "adapter": self.weights,
            "base": digest_base(session.model),
            "tokenizer": digest_tokenizer(session.tokenizer),
            "dataset": digest_json(session.rows),
            "session": run,
        }
        # SHA-256 by name of all that the audit depends on.
        self.digests: dict[str, str] = {
            **{name: str(inputs[name]) for name in ("adapter", "base", "tokenizer", "dataset")},
            "sae": self.info.fingerprint,
            "labels": digest_json(to_plain(labels)),
            "reference labels": digest_json(to_plain(reference)),
            "settings": digest_json([asdict(settings), run]),
        }
        self.folder = None if out is None else Path(out) / "parts"
        self.parts = Parts(self.folder, inputs)
        self.notes: dict[str, str] = {}
        self.label_key = digest_json([to_plain(labels), list(self.categories)])
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
            self.agreements = compare_labels(labels, reference, shared, seed=session.seed)

    @cached_property
    def categories(self) -> dict[str, list[int]]:
        """Features by category: those asked for that have any."""
        if self.labels is None:
            return {}
        found = self.labels.by_category(self.settings.categories)
        mcc, names = self.settings.label_mcc, self.settings.categories or self.labels.categories
        stray = sorted(set(mcc) - set(names)) if isinstance(mcc, Mapping) else []
        if stray:
            raise ValueError(
                f"Expected a label_mcc for categories among {list(names)}, got one for {stray}."
            )
        return found

    @property
    def no_category(self) -> str:
        """Why there are no categories."""
        return _NO_LABELS if self.labels is None else _NO_CATEGORY

    @cached_property
    def texts(self) -> dict[int, str]:
        """What the labels say about features, in a few words."""
        return short_texts(self.labels)

    @cached_property
    def base(self) -> PreferenceScores:
        """Scores of the base model."""

        def score() -> PreferenceScores:
            with self.session.base():
                return score_preferences(self.session, "base model")

        return self.parts.make("scores_base", PreferenceScores, score)

    @cached_property
    def trained(self) -> PreferenceScores:
        """Scores of the trained model."""

        def score() -> PreferenceScores:
            return score_preferences(self.session, "trained model")

        return self.parts.make("scores_trained", PreferenceScores, score)

    @cached_property
    def usages(self) -> tuple[Usage, ...]:
        """Use of features by segment, labeled."""

        def count() -> tuple[Usage, ...]:
            return compute_usages(self.session, segments=SEGMENTS)

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
        """Use on the chosen answers."""
        return self.usages[0]

    @cached_property
    def compositions(self) -> tuple[Composition, ...]:
        """Kinds of features by segment."""
        if not self.categories:
            return self.skip("compositions", self.no_category)

        def compose() -> tuple[Composition, ...]:
            return compute_compositions(self.session, self.categories, segments=SEGMENTS)

        return self.parts.make("compositions", tuple[Composition, ...], compose, self.label_key)

    @cached_property
    def magnitudes(self) -> tuple[Magnitudes, ...]:
        """How strongly each category is steered on the chosen answers."""
        if not self.categories:
            return self.skip("magnitudes", self.no_category)

        def measure() -> tuple[Magnitudes, ...]:
            return measure_magnitudes(self.session, self.categories)

        return self.parts.make("magnitudes", tuple[Magnitudes, ...], measure, self.label_key)

    @cached_property
    def ablations(self) -> tuple[Ablation, ...]:
        """What zeroing each category costs."""
        if not self.categories:
            return self.skip("ablations", self.no_category)
        n_random = self.settings.n_random

        def ablate() -> tuple[Ablation, ...]:
            return measure_categories(
                self.session, self.categories, self.chosen, trained=self.trained, n_random=n_random
            )

        kind = tuple[Ablation, ...]
        return self.parts.make("ablations", kind, ablate, self.label_key, n_random)

    @cached_property
    def single(self) -> FeatureAblations | None:
        """What zeroing single features costs."""
        n = self.settings.n_single
        if not n or len(self.chosen.features) < 2:
            self.skip("single", _NO_STEERING if n else _NOT_ASKED)
            return None

        def ablate() -> FeatureAblations:
            return measure_features(
                self.session, self.chosen, trained=self.trained, n_features=n, n_listed=n
            )

        return self.parts.make("single", FeatureAblations, ablate, self.label_key, n)

    @cached_property
    def static_dynamic(self) -> StaticDynamic | None:
        """Limited steering against the learned policy."""
        if len(self.chosen.features) < 2:
            self.skip("static_dynamic", _NO_STEERING)
            return None

        def compare() -> StaticDynamic:
            return compare_static_dynamic(
                self.session, self.chosen, base=self.base, trained=self.trained
            )

        return self.parts.make("static_dynamic", StaticDynamic, compare)

    @cached_property
    def mirror(self) -> Mirror | None:
        """Whether the adapter steers what the pairs prefer."""
        few = len(self.session.rows) < ENOUGH_PAIRS
        if few or not self.chosen.features:
            self.skip("mirror", _FEW_PAIRS if few else _NO_STEERING)
            return None

        def compare() -> Mirror:
            return compute_mirror(self.session, self.chosen, out=self.folder)

        return self.parts.make("mirror", Mirror, compare, self.label_key)

    @cached_property
    def coherence(self) -> tuple[VariantCoherence, ...]:
        """How fluent the answers are."""
        session, length = self.session, self.settings.max_new_tokens
        prompts = [row["prompt"] for row in session.rows[: self.settings.n_coherence]]
        if not prompts:
            return self.skip("coherence", _NOT_ASKED)

        def sample() -> tuple[VariantCoherence, ...]:
            return compare_coherence(
                session.model,
                prompts,
                session.tokenizer,
                without=self.categories,
                max_new_tokens=length,
                seed=session.seed,
                batch_size=session.batch_size,
            )

        kind = tuple[VariantCoherence, ...]
        return self.parts.make("coherence", kind, sample, self.label_key, len(prompts), length)

    @cached_property
    def generations(self) -> tuple[Generation, ...]:
        """Answers, token by token."""
        prompts = self.session.prompts[: self.settings.n_generations]
        length = self.settings.max_new_tokens
        if not prompts:
            return self.skip("generations", _NOT_ASKED)

        def sample() -> tuple[Generation, ...]:
            return compare_generations(
                self.session, prompts, without=self.categories, max_new_tokens=length
            )

        kind = tuple[Generation, ...]
        return self.parts.make("generations", kind, sample, self.label_key, len(prompts), length)

    @cached_property
    def strongest(self) -> tuple[list[FeatureUse], list[FeatureUse]]:
        """The features most promoted, and those most suppressed."""
        uses, n = self.chosen.features, self.settings.n_cards
        ordered = sorted(uses, key=lambda use: -use.mean_steering)
        promoted = [use for use in ordered if use.mean_steering > 0][:n]
        suppressed = [use for use in reversed(ordered) if use.mean_steering < 0][:n]
        return promoted, suppressed

    def cards(self) -> tuple[tuple[FeatureCard, ...], tuple[FeatureCard, ...]]:
        """The same, as a reader sees them."""
        promoted, suppressed = self.strongest
        wanted = [use.feature for use in (*promoted, *suppressed)]
        if not wanted:
            self.skip("promoted", _NOT_ASKED if self.chosen.features else _NO_STEERING)
            return (), ()

        def look() -> tuple[FeatureEvidence, ...]:
            # Nothing is held out here: nobody tests descriptions on the rest.
            return collect_evidence(self.session, wanted, n_contexts=3, held_out=0.0)

        found = self.parts.make("evidence", tuple[FeatureEvidence, ...], look, wanted)
        evidence = {each.feature: each for each in found}
        labels = {each.feature: each for each in (self.labels.features if self.labels else ())}

        def show(use: FeatureUse) -> FeatureCard:
            feature = use.feature
            url = feature_url(self.info.neuronpedia_id, feature)
            return FeatureCard(use, labels.get(feature), evidence.get(feature), url)

        return tuple(map(show, promoted)), tuple(map(show, suppressed))

    def robustness(self) -> tuple[Robustness, ...]:
        """Enrichments and rises under labels redrawn with the error rates that a reference shows.

        Or with those of the correlation that the settings give. Empty without either, and where a
        check of the labels leaves nothing to redraw. A feature in doubt is as likely to belong to a
        category however much it is used: what survives that is safe.
        """
        settings, session = self.settings, self.session
        rates = self._error_rates() if settings.n_draws else []
        if self.labels is None or not rates:
            return ()
        # What has no error rates is not redrawn: its figures would be the same in every draw.
        names = tuple(rate.category for rate in rates)
        labels = replace(self.labels, categories=names)
        few = replace(session, dataset=session.rows[:_PAIRS], progress=False)
        losses = self.trained.losses[:_PAIRS]

        def rise(features: Sequence[int]) -> float:
            with ablate_features(session.model, features):
                return score_preferences(few).loss - sum(losses) / len(losses)

        def redraw() -> tuple[Robustness, ...]:
            counts = count_features(session, segments=("chosen",))["chosen"]
            n_draws, seed = settings.n_draws, session.seed
            shares = propagate_composition(labels, rates, [counts], n_draws=n_draws, seed=seed)
            rises = propagate_ablation(
                labels,
                rates,
                rise,
                n_draws=max(1, n_draws // _DRAWS_PER_ABLATION),
                seed=seed,
                progress=session.progress,
            )
            return (*shares, *rises)

        reference = digest_json(to_plain(self.reference))
        key = (self.label_key, reference, names, settings.n_draws, settings.label_mcc)
        return self.parts.make("robustness", tuple[Robustness, ...], redraw, *key)

    def _error_rates(self) -> list[ErrorRates]:
        mcc = self.settings.label_mcc
        if self.agreements:
            return [error_rates(a) for a in self.agreements if a.category in self.categories]
        if mcc is None or self.labels is None:
            return []
        known = mcc if isinstance(mcc, Mapping) else dict.fromkeys(self.categories, mcc)
        n = len(self.labels.features)
        shares = {name: len(self.labels.members(name)) / n for name in known}
        return [
            error_rates_for_mcc(name, known[name], judged_share=share)
            for name, share in shares.items()
            if 0 < share < 1
        ]

    def skip(self, part: str, why: str) -> tuple[Any, ...]:
        """Note why a part is missing."""
        self.notes[part] = why
        return ()
