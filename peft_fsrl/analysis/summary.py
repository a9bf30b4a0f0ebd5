"""What a run achieved and what carries it, in one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..records import Record
from . import statistics
from .ablation import Ablation, measure_categories
from .generations import Generation, compare_generations
from .preferences import PreferenceScores, score_preferences
from .session import Session
from .usage import Usage, compute_usage


@dataclass(frozen=True)
class Summary(Record):
    """What a training run achieved and what carries it.

    Attributes:
        base: scores with the adapter disabled.
        trained: scores with it.
        usage: features steered on the evaluation texts.
        ablations: one per category.
        generations: sample texts before and after.
    """

    base: PreferenceScores
    trained: PreferenceScores
    usage: Usage
    ablations: tuple[Ablation, ...]
    generations: tuple[Generation, ...]


def compute_summary(
    session: Session,
    *,
    labels: Mapping[int, str] | None = None,
    categories: Mapping[str, Sequence[int]] | None = None,
    n_features: int | None = None,
    n_random: int = 5,
    n_generations: int = 2,
    generation_seed: int | None = None,
) -> Summary:
    """Score base and trained model, measure feature use, ablate categories, sample texts.

    Args:
        session: its model generates and has one FSRL layer; its data are held out.
        labels: what features detect, where known.
        categories: feature indices by category, best first; None skips the ablation.
        n_features: features zeroed per category; None takes all.
        n_random: draws of each control of an ablation.
        n_generations: prompts to continue.
        generation_seed: of these continuations; None takes the session's.

    Raises:
        ValueError: for an empty data set, and with categories for fewer than two pairs.
        ImportError: with categories, without the ``audit`` extra.
    """
    if categories:
        statistics.require()
    with session.base():
        base = score_preferences(session, "base model")
    trained = score_preferences(session, "trained model")
    usage = compute_usage(session, labels=labels)
    ablations: tuple[Ablation, ...] = ()
    if categories:
        ablations = measure_categories(
            session,
            categories,
            usage,
            trained=trained,
            n_features=n_features,
            n_random=n_random,
        )
    without = {ablation.name: ablation.features for ablation in ablations}
    prompts = [row["prompt"] for row in session.rows[:n_generations]]
    seed = session.seed if generation_seed is None else generation_seed
    generations = compare_generations(replace(session, seed=seed), prompts, without=without)
    return Summary(base, trained, usage, ablations, generations)
