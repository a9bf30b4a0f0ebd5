"""What a run achieved and what carries it, in one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..steering import scale_steering
from . import statistics
from .ablation import ablate_categories
from .generations import compare_generations
from .preferences import score_preferences
from .records import Summary
from .usage import compute_usage


def compute_summary(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    labels: Mapping[int, str] | None = None,
    categories: Mapping[str, Sequence[int]] | None = None,
    n_features: int | None = None,
    n_generations: int = 2,
    generation_seed: int = 0,
    beta: float = 10.0,
    gamma: float = 5.0,
    batch_size: int = 16,
    show_progress: bool = True,
) -> Summary:
    """Score base and trained model, measure feature use, ablate categories, sample texts.

    Args:
        model: a generating model with one FSRL layer.
        dataset: held-out rows with the texts ``prompt``, ``chosen`` and ``rejected``.
        tokenizer: the model's tokenizer.
        labels: what features detect, where known.
        categories: feature indices by category, best first; None skips the ablation.
        n_features: features zeroed per category; None takes the size of the smallest.
        n_generations: prompts to continue.
        generation_seed: seed of the first continuation.
        beta: SimPO's reward scale.
        gamma: SimPO's target margin.
        batch_size: pairs per forward pass.
        show_progress: show progress bars.

    Raises:
        ValueError: for an empty data set, and with categories for fewer than two pairs.
        ImportError: with categories, without the ``audit`` extra.
    """
    if categories:
        statistics.require()
    settings: dict[str, Any] = {"beta": beta, "gamma": gamma, "batch_size": batch_size}

    def bar(text: str) -> str | None:
        return text if show_progress else None

    with scale_steering(model, 0.0):
        base = score_preferences(
            model, dataset, tokenizer, description=bar("base model"), **settings
        )
    trained = score_preferences(
        model, dataset, tokenizer, description=bar("trained model"), **settings
    )
    usage = compute_usage(
        model,
        dataset,
        tokenizer,
        labels=labels,
        batch_size=batch_size,
        description=bar("feature use"),
    )
    ablations = (
        ablate_categories(
            model,
            dataset,
            tokenizer,
            categories,
            usage,
            trained=trained,
            n_features=n_features,
            description=bar("without"),
            **settings,
        )
        if categories
        else ()
    )
    prompts = [dataset[row]["prompt"] for row in range(min(n_generations, len(dataset)))]
    without = {ablation.name: ablation.features for ablation in ablations}
    generations = compare_generations(
        model, prompts, tokenizer, without=without, seed=generation_seed
    )
    return Summary(base, trained, usage, ablations, generations)
