"""Features chosen anew at each token, or once for all, against the learned policy (figure 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..steering import only_features, scale_steering, top_k_steering
from . import statistics
from .preferences import score_preferences
from .records import PreferenceScores, StaticDynamic, SteeringLevel, Usage
from .segments import TokenChunk, active_sae, stream_tokens
from .usage import require_chosen

_SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)


def compare_static_dynamic(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    usage: Usage,
    *,
    shares: Sequence[float] = _SHARES,
    base: PreferenceScores | None = None,
    trained: PreferenceScores | None = None,
    seed: int = 0,
    beta: float = 10.0,
    gamma: float = 5.0,
    batch_size: int = 16,
    description: str | None = None,
) -> StaticDynamic:
    """Preference scores with steering limited to some share of the SAE's features.

    Dynamic steering keeps at each token the features with the largest ``|v|``; static steering
    keeps the same features everywhere, those with the most steering mass on the chosen answers. One
    adapter steers one layer, so that ``v`` does not depend on what is kept of it: the features per
    token follow from one pass over the chosen answers, special tokens left out.

    Args:
        model: a model with one FSRL layer.
        dataset: rows with the texts ``prompt``, ``chosen`` and ``rejected``; read once for the
            features per token, and twice per share.
        tokenizer: the model's tokenizer.
        usage: the adapter's use of features on the chosen answers, from ``compute_usage``.
        shares: of the SAE's features, each rounded up to a whole number of features.
        base: scores without steering, if they are known.
        trained: scores of the model as it is, if they are known.
        seed: of the bootstrap.
        beta: see ``score_preferences``.
        gamma: see ``score_preferences``.
        batch_size: pairs per forward pass.
        description: shown beside the progress bars; None shows none.

    Raises:
        ValueError: for a share out of range, use on other tokens than the chosen answers', more
            than one FSRL layer, or fewer than two pairs.
        ImportError: without the ``audit`` extra.
    """
    statistics.require()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"Expected shares above 0 and up to 1, got {tuple(shares)}.")
    require_chosen(usage)

    def bar(text: str) -> str | None:
        return None if description is None else f"{description} {text}"

    def score(editing: AbstractContextManager[None], name: str) -> PreferenceScores:
        with editing:
            return score_preferences(
                model,
                dataset,
                tokenizer,
                beta=beta,
                gamma=gamma,
                batch_size=batch_size,
                description=bar(name),
            )

    d_sae = active_sae(model).info.d_sae
    if base is None:
        base = score(scale_steering(model, 0.0), "base model")
    if trained is None:
        trained = score(nullcontext(), "trained model")
    counts = count_steered(
        model, dataset, tokenizer, batch_size=batch_size, description=bar("features per token")
    )
    by_mass = [use.feature for use in usage.features]
    frequencies = [use.frequency for use in usage.features]
    n_steered = len(by_mass)
    sizes = {share: math.ceil(share * d_sae) for share in shares}
    # Small shares of a small SAE may all be the same one feature.
    kept = {n: score(top_k_steering(model, n), f"{n} per token") for n in set(sizes.values())}
    fixed = {n: score(only_features(model, by_mass[:n]), f"{n} fixed") for n in kept}
    dynamic = [_level(s, n, _mean_limited(counts, n), kept[n], seed) for s, n in sizes.items()]
    static = [_level(s, n, sum(frequencies[:n]), fixed[n], seed) for s, n in sizes.items()]
    return StaticDynamic(
        d_sae=d_sae,
        base_loss=base.loss,
        learned=_level(n_steered / d_sae, n_steered, usage.l0, trained, seed),
        dynamic=tuple(dynamic),
        static=tuple(static),
    )


def count_steered(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    segment: str = "chosen",
    batch_size: int = 16,
    description: str | None = None,
) -> Tensor:
    """How many tokens of a segment have 0, 1, 2, ... steered features.

    Returns:
        Shape ``(n_features + 1,)``, integers.

    Raises:
        ValueError: as ``stream_tokens`` does.
    """
    counts = torch.zeros(active_sae(model).n_features + 1, dtype=torch.long)

    def add(chunk: TokenChunk) -> None:
        per_token = (chunk.v != 0).sum(dim=1).cpu()
        counts.add_(torch.bincount(per_token, minlength=len(counts)))

    stream_tokens(
        model, dataset, tokenizer, (segment,), add, batch_size=batch_size, description=description
    )
    return counts


def _mean_limited(counts: Tensor, limit: int) -> float:
    """Mean of ``min(count, limit)`` over tokens."""
    limited = torch.arange(len(counts)).clamp(max=limit)
    return float((counts * limited).sum() / counts.sum())


def _level(
    share: float, n_features: int, l0: float, scores: PreferenceScores, seed: int
) -> SteeringLevel:
    return SteeringLevel(
        share=share,
        n_features=n_features,
        l0=l0,
        loss=statistics.mean_interval(scores.losses, seed=seed),
        accuracy=statistics.proportion_interval([margin > 0 for margin in scores.margins]),
        margin=statistics.mean_interval(scores.margins, seed=seed),
    )
