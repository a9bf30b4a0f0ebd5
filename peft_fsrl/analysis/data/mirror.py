"""Does an adapter do what its data prefer?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...records import Interval, Record
from .. import statistics
from ..segments import TokenChunk, active_sae, stream_tokens
from ..session import CHOSEN, Session
from ..usage import Usage, require_chosen
from .contrast import contrast_features, require_pairs
from .reading import PairReading, read_pairs

if TYPE_CHECKING:
    from jaxtyping import Float
# Of so many features at once the differences of all pairs are laid out.
_COLUMNS = 4096


@dataclass(frozen=True)
class MirroredFeature(Record):
    """What an adapter does to a feature beside what the data prefer.

    Attributes:
        feature: index in the SAE.
        steering: mean of ``v`` over the tokens of chosen answers.
        share: of the steering mass, ``|v|`` over these tokens.
        difference: of its mean activation, chosen minus rejected; see ``FeatureContrast``.
        q: smallest false-discovery rate at which it separates chosen from rejected answers.
        pull: fall of the SimPO loss per unit of ``v`` at every token, at the base model.
        explained: whether it separates, in the direction in which it is steered.
        label: what it detects, if known.
    """

    feature: int
    steering: float
    share: float
    difference: float
    q: float
    pull: float
    explained: bool
    label: str | None = None


@dataclass(frozen=True)
class Mirror(Record):
    """How much of an adapter's steering the contrast of a preference set predicts.

    Attributes:
        n_pairs: preference pairs.
        n_steered: features that are steered at all on the chosen answers.
        correlation: Spearman's, over these features, between mean steering and contrast
            (``difference``); None for fewer than three.
        cosine: between mean steering and contrast over all features, in which sizes count and not
            ranks alone; None if nothing is steered.
        pull_correlation: Spearman's, between mean steering and the pull of the loss.
        explained: share of the steering mass on features that separate chosen from rejected answers
            in the direction in which they are steered; None if nothing is steered.
        by_chance: what that share would be for as much steering on all tested features alike, in
            directions drawn by a coin.
        features: those steered, most steering mass first, cut at some number.
    """

    n_pairs: int
    n_steered: int
    correlation: Interval | None
    cosine: Interval | None
    pull_correlation: float | None
    explained: Interval | None
    by_chance: float
    features: tuple[MirroredFeature, ...]

    @property
    def unexplained(self) -> tuple[MirroredFeature, ...]:
        """The steered features that the data do not explain, as far as they were kept."""
        return tuple(each for each in self.features if not each.explained)


def compute_mirror(
    session: Session, usage: Usage, *, n_features: int = 50, out: str | Path | None = None
) -> Mirror:
    """How much of an adapter's steering of chosen answers the data's own contrast predicts.

    The contrast is the base model's, of ``compute_contrast``, on the session's pairs. Intervals
    resample pairs; which features separate is taken as found.

    Args:
        session: its model has one FSRL layer; its pairs are drawn like those of the training.
        usage: of features on the chosen answers, from ``compute_usage``.
        n_features: how many features to keep.
        out: as ``compute_contrast`` takes it; both keep the same.

    Raises:
        ValueError: for fewer than 20 pairs, use on other tokens than chosen answers, and as
            ``read_pairs`` does.
        ImportError: without the ``audit`` extra.
    """
    statistics.require()
    require_chosen(usage)
    require_pairs(session)
    reading = read_pairs(session, None if out is None else Path(out))
    found = contrast_features(reading, topics=None, n_topics=8, seed=session.seed)
    places = active_sae(session.model).positions([use.feature for use in usage.features])
    index = active_sae(session.model).feature_index[places].tolist()
    signed, mass = _steering(session, places)
    steering, difference = signed.sum(0), found.difference[places]
    explained = found.separates[places] & (steering.sign() == difference.sign())
    pulls = -reading.slopes[0, places] / reading.n_pairs
    n_tokens, total = usage.n_tokens, float(mass.sum())
    labels = {use.feature: use.label for use in usage.features}
    records = [
        MirroredFeature(
            feature=feature,
            steering=float(steering[i]) / n_tokens,
            share=float(mass[:, i].sum()) / total,
            difference=float(difference[i]),
            q=float(found.q[places[i]]),
            pull=float(pulls[i]),
            explained=bool(explained[i]),
            label=labels[feature],
        )
        for i, feature in enumerate(index)
    ]
    n_tested = int(found.tested.sum())
    return Mirror(
        n_pairs=reading.n_pairs,
        n_steered=len(index),
        # Resampled, these differences have the weights of the regression.
        correlation=statistics.spearman_interval(
            signed, found.leverage[:, None] * reading.dense(places), seed=session.seed
        ),
        cosine=_cosine(signed, reading, places, found.leverage, session.seed) if total else None,
        pull_correlation=statistics.spearman(steering.tolist(), pulls.tolist()),
        explained=statistics.ratio_interval(
            mass[:, explained].sum(1).tolist(), mass.sum(1).tolist(), seed=session.seed
        )
        if total
        else None,
        by_chance=int(found.separates.sum()) / max(1, n_tested) / 2,
        features=tuple(sorted(records, key=lambda each: -each.share)[:n_features]),
    )


def _cosine(
    signed: Float[Tensor, "pairs features"],
    reading: PairReading,
    places: Tensor,
    leverage: Float[Tensor, "pairs"],
    seed: int,
) -> Interval:
    """Of mean steering, zero but for some features, and the contrast of all features."""
    products = torch.zeros(reading.n_pairs, reading.n_pairs, dtype=torch.float64)
    for some in torch.arange(reading.n_features).split(_COLUMNS):
        differences = leverage[:, None] * reading.dense(some)
        products += differences @ differences.T
    steered, contrast = signed.numpy(), (leverage[:, None] * reading.dense(places)).numpy()
    lengths = products.numpy()

    def cosine(weights: Any) -> Any:
        v, d = weights @ steered, weights @ contrast
        norms = (v**2).sum(axis=1) * ((weights @ lengths) * weights).sum(axis=1)
        return (v * d).sum(axis=1) / np.where(norms > 0, norms, 1.0) ** 0.5

    size = reading.n_pairs + 2 * len(places)
    return statistics.weighted_interval(cosine, reading.n_pairs, size=size, seed=seed)


def _steering(
    session: Session, places: Tensor
) -> tuple[Float[Tensor, "pairs features"], Float[Tensor, "pairs features"]]:
    """Sums of ``v`` and of ``|v|`` over the tokens of each chosen answer."""
    sums = torch.zeros(2, len(session.rows), len(places), dtype=torch.float64)

    def add(chunk: TokenChunk) -> None:
        v = chunk.v[:, places.to(chunk.v.device)].double()
        sums[:, chunk.row] += torch.stack([v.sum(0), v.abs().sum(0)]).cpu()

    stream_tokens(session, (CHOSEN,), add, "steering")
    signed, mass = sums
    return signed, mass
