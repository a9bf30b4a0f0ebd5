"""What the loss loses when the steering of a category of features is zeroed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..steering import ablate_features
from .preferences import score_preferences
from .records import Ablation, Usage


def ablate_categories(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]] | Iterable[Mapping[str, Any]],
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
    """Zero the steering of each category in turn, and of random features of the same number.

    Random features are drawn from those that the adapter steers and that no category holds, so that
    the control zeroes something that acts.

    Args:
        model: a model with an FSRL adapter.
        dataset: rows with the texts ``prompt``, ``chosen`` and ``rejected``; read once per draw.
        tokenizer: the model's tokenizer.
        categories: feature indices by category, best first.
        usage: the adapter's use of features, from ``compute_usage``.
        n_features: how many of each category; None takes as many as the smallest category has.
        n_random: draws of the control.
        seed: seed of the draws.
        beta: see ``score_preferences``.
        gamma: see ``score_preferences``.
        batch_size: pairs per forward pass.
        description: shown beside the progress bars; None shows none.

    Raises:
        ValueError: for no category, or one with fewer features than asked for.
    """
    if not categories:
        raise ValueError("Expected at least one category of features, got none.")
    smallest = min(len(features) for features in categories.values())
    n = smallest if n_features is None else n_features
    if not 0 < n <= smallest:
        sizes = {name: len(features) for name, features in categories.items()}
        raise ValueError(f"Cannot take {n} features of every category; they have {sizes}.")
    draws = {name: [list(features[:n])] for name, features in categories.items()}
    held = {feature for features in categories.values() for feature in features}
    steered = sorted(use.feature for use in usage.features if use.feature not in held)
    rng = random.Random(seed)
    if n_random and steered:
        draws["random"] = [
            sorted(rng.sample(steered, min(n, len(steered)))) for _ in range(n_random)
        ]
    results = []
    for name, sets in draws.items():
        scores = []
        for features in sets:
            with ablate_features(model, features):
                scores.append(
                    score_preferences(
                        model,
                        dataset,
                        tokenizer,
                        beta=beta,
                        gamma=gamma,
                        batch_size=batch_size,
                        description=None if description is None else f"{description} {name}",
                    )
                )
        results.append(Ablation(name, tuple(tuple(s) for s in sets), tuple(scores)))
    return tuple(results)
