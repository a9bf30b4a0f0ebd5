"""What the loss loses when the steering of a category of features is zeroed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..steering import ablate_features
from .preferences import score_preferences
from .records import Ablation, PreferenceScores, Usage


def ablate_categories(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    categories: Mapping[str, Sequence[int]],
    usage: Usage,
    *,
    n_features: int | None = None,
    n_random: int = 5,
    seed: int = 0,
    beta: float = 10.0,
    gamma: float = 5.0,
    batch_size: int = 16,
    description: str | None = None,
) -> tuple[Ablation, ...]:
    """Zero the steering of each category in turn, and of as many random features.

    Random features are drawn from those that the adapter steers and that no category holds, so that
    the control zeroes something that acts.

    Args:
        model: a model with an FSRL adapter.
        dataset: rows with the texts ``prompt``, ``chosen`` and ``rejected``; read once per draw.
        tokenizer: the model's tokenizer.
        categories: feature indices by category, best first.
        usage: the adapter's use of features, from ``compute_usage``.
        n_features: take only the first so many of every category; None takes all.
        n_random: draws of each category's control.
        seed: seed of the draws.
        beta: see ``score_preferences``.
        gamma: see ``score_preferences``.
        batch_size: pairs per forward pass.
        description: shown beside the progress bars; None shows none.

    Raises:
        ValueError: for no category, or one with fewer features than asked for, or none.
    """
    sizes = {name: len(features) for name, features in categories.items()}
    if not sizes or min(sizes.values()) < (1 if n_features is None else max(1, n_features)):
        raise ValueError(
            f"Expected at least one category, each with {n_features or 'some'} features; got "
            f"{sizes}."
        )
    held = {feature for features in categories.values() for feature in features}
    pool = sorted(use.feature for use in usage.features if use.feature not in held)
    rng = random.Random(seed)

    def score_without(features: Sequence[int], name: str) -> PreferenceScores:
        with ablate_features(model, features):
            return score_preferences(
                model,
                dataset,
                tokenizer,
                beta=beta,
                gamma=gamma,
                batch_size=batch_size,
                description=None if description is None else f"{description} {name}",
            )

    ablations = []
    for name, features in categories.items():
        chosen = tuple(features[:n_features])
        draws = [rng.sample(pool, min(len(chosen), len(pool))) for _ in range(n_random) if pool]
        control = tuple(score_without(draw, "random features") for draw in draws)
        ablations.append(Ablation(name, chosen, score_without(chosen, name), control))
    return tuple(ablations)
