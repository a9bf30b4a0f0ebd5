"""Whether an audit's conclusions survive the errors of its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...steering import ablate_features
from ..composition import count_features
from ..labels import (
    error_rates,
    error_rates_for_mcc,
    propagate_ablation,
    propagate_composition,
)
from ..preferences import score_preferences
from ..records import ErrorRates, Labels, Robustness
from ._stages import Stages

# An ablation under redrawn labels runs the model: fewer draws, on fewer pairs.
_DRAWS_PER_ABLATION = 10
_PAIRS = 100


def compute_robustness(stages: Stages) -> tuple[Robustness, ...]:
    """Enrichments and rises under labels redrawn with the error rates that a reference shows.

    Or with those of the correlation that the settings give. Empty without either, and where a check
    of the labels leaves nothing to redraw. A feature in doubt is as likely to belong to a category
    however much it is used: what survives that is safe.
    """
    labels, settings = stages.labels, stages.settings
    if labels is None or not settings.n_draws:
        return ()
    rates = _error_rates(stages, labels)
    # What has no error rates is not redrawn: its figures would be the same in every draw.
    names = tuple(rate.category for rate in rates)
    labels = replace(labels, categories=names)
    if not rates:
        return ()

    def redraw() -> tuple[Robustness, ...]:
        counts = stages.run(
            count_features, "labels", segments=("chosen",), batch_size=settings.batch_size
        )["chosen"]
        shared: dict[str, Any] = {"seed": settings.seed}
        shares = propagate_composition(labels, rates, [counts], n_draws=settings.n_draws, **shared)
        rises = propagate_ablation(
            labels,
            rates,
            rise,
            n_draws=max(1, settings.n_draws // _DRAWS_PER_ABLATION),
            progress=stages.show_progress,
            **shared,
        )
        return (*shares, *rises)

    pairs = [stages.dataset[row] for row in range(min(_PAIRS, len(stages.dataset)))]
    trained = stages.trained.losses[: len(pairs)]

    def rise(features: Sequence[int]) -> float:
        with ablate_features(stages.model, features):
            scores = score_preferences(stages.model, pairs, stages.tokenizer, **stages.simpo)
        return scores.loss - sum(trained) / len(trained)

    key = (stages.label_key, stages.reference_key, names, settings.n_draws, settings.label_mcc)
    found: tuple[Robustness, ...] = stages.parts.make(
        "robustness", tuple[Robustness, ...], redraw, *key
    )
    return found


def _error_rates(stages: Stages, labels: Labels) -> list[ErrorRates]:
    mcc = stages.settings.label_mcc
    if stages.agreements:
        return [error_rates(a) for a in stages.agreements if a.category in stages.categories]
    if mcc is None:
        return []
    shares = {name: len(labels.members(name)) / len(labels.features) for name in stages.categories}
    return [
        error_rates_for_mcc(name, mcc, judged_share=share)
        for name, share in shares.items()
        if 0 < share < 1
    ]
