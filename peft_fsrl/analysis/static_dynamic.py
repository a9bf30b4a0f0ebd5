"""Features chosen anew at each token, or once for all, against the learned policy (figure 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import Interval, Record
from ..steering import only_features, top_k_steering
from . import statistics
from .preferences import PreferenceScores, score_preferences
from .segments import TokenChunk, active_sae, stream_tokens
from .session import Session
from .usage import Usage, require_chosen

_SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)


@dataclass(frozen=True)
class SteeringLevel(Record):
    """Preference scores with steering limited to some features.

    Attributes:
        share: of the SAE's features that may be steered, per token or as one fixed set.
        n_features: that many.
        l0: features steered per answer token then.
        loss: mean SimPO loss.
        accuracy: preference accuracy.
        margin: mean reward margin.
    """

    share: float
    n_features: int
    l0: float
    loss: Interval
    accuracy: Interval
    margin: Interval


@dataclass(frozen=True)
class StaticDynamic(Record):
    """Few features chosen anew at each token, or once for all, against the policy (figure 4).

    Attributes:
        d_sae: features of the SAE.
        base_loss: mean SimPO loss without steering.
        learned: the adapter as it was trained, at its own l0.
        dynamic: only the largest ``|v|`` of each token.
        static: only a fixed set, those with the most steering mass.
    """

    d_sae: int
    base_loss: float
    learned: SteeringLevel
    dynamic: tuple[SteeringLevel, ...]
    static: tuple[SteeringLevel, ...]


def compare_static_dynamic(
    session: Session,
    usage: Usage,
    *,
    shares: Sequence[float] = _SHARES,
    base: PreferenceScores | None = None,
    trained: PreferenceScores | None = None,
) -> StaticDynamic:
    """Preference scores with steering limited to some share of the SAE's features.

    Dynamic steering keeps at each token the features with the largest ``|v|``; static steering
    keeps the same features everywhere, those with the most steering mass on the chosen answers. One
    adapter steers one layer, so that ``v`` does not depend on what is kept of it: the features per
    token follow from one pass over the chosen answers, special tokens left out.

    Args:
        session: its model has one FSRL layer. The data are scored twice per share.
        usage: the adapter's use of features on the chosen answers, from ``compute_usage``.
        shares: of the SAE's features, each rounded up to a whole number of features.
        base: scores without steering, if they are known.
        trained: scores of the model as it is, if they are known.

    Raises:
        ValueError: for a share out of range, use on other tokens than the chosen answers', more
            than one FSRL layer, or fewer than two pairs.
        ImportError: without the ``audit`` extra.
    """
    statistics.require()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"Expected shares above 0 and up to 1, got {tuple(shares)}.")
    require_chosen(usage)
    model, seed = session.model, session.seed

    sae = active_sae(model)
    trained = trained or score_preferences(session, "trained model")

    def score(editing: AbstractContextManager[None], name: str, n: int = 0) -> PreferenceScores:
        if n >= sae.n_features:
            # An adapter of so few features is not limited.
            return trained
        with editing:
            return score_preferences(session, name)

    d_sae = sae.info.d_sae
    base = base or score(session.base(), "base model")
    counts = count_steered(session)
    by_mass = [use.feature for use in usage.features]
    frequencies = [use.frequency for use in usage.features]
    n_steered = len(by_mass)
    sizes = {share: math.ceil(share * d_sae) for share in shares}
    # Small shares of a small SAE may all be the same one feature.
    kept = {n: score(top_k_steering(model, n), f"{n} per token", n) for n in set(sizes.values())}
    fixed = {n: score(only_features(model, by_mass[:n]), f"{n} fixed", n) for n in kept}
    dynamic = [_level(s, n, _mean_limited(counts, n), kept[n], seed) for s, n in sizes.items()]
    static = [_level(s, n, sum(frequencies[:n]), fixed[n], seed) for s, n in sizes.items()]
    return StaticDynamic(
        d_sae=d_sae,
        base_loss=base.loss,
        learned=_level(n_steered / d_sae, n_steered, usage.l0, trained, seed),
        dynamic=tuple(dynamic),
        static=tuple(static),
    )


def count_steered(session: Session, segment: str = "chosen") -> Tensor:
    """How many tokens of a segment have 0, 1, 2, ... steered features.

    Returns:
        Shape ``(n_features + 1,)``, integers.

    Raises:
        ValueError: as ``stream_tokens`` does.
    """
    counts = torch.zeros(active_sae(session.model).n_features + 1, dtype=torch.long)

    def add(chunk: TokenChunk) -> None:
        per_token = (chunk.v != 0).sum(dim=1).cpu()
        counts.add_(torch.bincount(per_token, minlength=len(counts)))

    stream_tokens(session, (segment,), add, "features per token")
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
