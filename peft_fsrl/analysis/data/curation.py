"""Curated preference sets in which some features no longer decide what is preferred."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...records import Interval, Record
from .. import statistics
from ..segments import active_sae
from ..session import CHOSEN, REJECTED, Session
from .contrast import require_pairs
from .probe import crossfit_scores
from .reading import PairReading, read_pairs

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

DROP, RELABEL = "drop", "relabel"


@dataclass(frozen=True)
class Curation(Record):
    """Which pairs of a preference set to drop or to flip, so that some features are balanced.

    Attributes:
        action: ``"drop"`` or ``"relabel"``.
        features: the features, indices in the SAE.
        n_pairs: pairs that the set has.
        agree: pairs whose chosen answer the features prefer.
        disagree: pairs whose rejected answer they prefer; in the rest they see no difference.
        alone: of those that agree, pairs whose chosen answer all other features do not prefer.
        rows: numbers of the pairs to drop or to flip, ascending.
        before: share of the pairs that agree, among those in which the features see a difference.
        after: the same once the pairs are dropped or flipped.
        rest_before: share of pairs in which the other features prefer the chosen answer.
        rest_after: the same once the pairs are dropped or flipped.
    """

    action: str
    features: tuple[int, ...]
    n_pairs: int
    agree: int
    disagree: int
    alone: int
    rows: tuple[int, ...]
    before: Interval
    after: Interval
    rest_before: Interval
    rest_after: Interval


def compute_curation(
    session: Session,
    features: Iterable[int],
    action: str,
    *,
    out: str | Path | None = None,
) -> Curation:
    """Find the pairs to drop or to flip, so that some features no longer decide what is preferred.

    The features prefer the answer to which a probe on them alone, fitted on other pairs, gives the
    higher score; so do all other features, by a probe fitted as if the given ones were balanced, in
    which whatever goes along with them has no part.

    To drop are pairs drawn at random, nearly all of them such whose chosen answer the features
    prefer, until among those that the others support, and among those that they do not, the
    features prefer the chosen answer as often as the rejected one. Dropping the least supported
    pairs would balance the features as well, but leave only pairs against them where the others say
    nothing: their opposite would be learned. To flip are pairs whose preference the features
    explain alone, which the others do not support, the least supported first, until the features
    are balanced or no such pair is left.

    Args:
        session: its model has one FSRL layer, trained or not: everything is about the base model.
        features: indices in the SAE.
        action: ``"drop"`` or ``"relabel"``.
        out: as ``compute_contrast`` takes it; both keep the same.

    Raises:
        ValueError: for another action, no feature, fewer than 20 pairs, features that do not tell
            the chosen answers, nothing that would be left; and as ``read_pairs`` does.
        IndexError: for a feature that the SAE does not have.
        ImportError: without the ``audit`` extra.
    """
    statistics.require()
    if action not in (DROP, RELABEL):
        raise ValueError(f"Expected {DROP!r} or {RELABEL!r}, got {action!r}.")
    chosen = tuple(sorted(set(features)))
    places = active_sae(session.model).positions(chosen)
    if not len(places):
        raise ValueError("Expected at least one feature that the adapter's SAE has, got none.")
    require_pairs(session)
    reading = read_pairs(session, None if out is None else Path(out))
    scores, rest = _preferences(reading, places, session.rows)
    agrees, differs = scores > 0, scores != 0
    before = _share(scores, differs)
    if before.low <= 0.5:
        raise ValueError(
            f"Expected features that tell the chosen answers, found that the {len(chosen)} given "
            f"prefer the chosen one in {int(agrees.sum())} of {int(differs.sum())} pairs: nothing "
            f"is there to {action}."
        )
    surplus = int(agrees.sum()) - int((scores < 0).sum())
    if action == DROP:
        changed = _surplus(scores, rest, session.seed)
        if len(changed) == reading.n_pairs:
            raise ValueError(
                "Expected pairs in which all other features prefer another answer than the "
                f"{len(chosen)} given ones, found none of {len(changed)}: balance would leave "
                "nothing. Give more pairs."
            )
    else:
        alone = torch.where(agrees & (rest <= 0), rest, torch.inf)
        changed = alone.argsort(stable=True)[: min(surplus // 2, int(alone.isfinite().sum()))]
    changed = changed.sort().values
    sign = torch.ones_like(scores)
    sign[changed] = 0.0 if action == DROP else -1.0
    return Curation(
        action=action,
        features=chosen,
        n_pairs=reading.n_pairs,
        agree=int(agrees.sum()),
        disagree=int((scores < 0).sum()),
        alone=int((agrees & (rest <= 0)).sum()),
        rows=tuple(changed.tolist()),
        before=before,
        after=_share(sign * scores, differs & (sign != 0)),
        rest_before=_share(rest, rest != 0),
        rest_after=_share(sign * rest, (rest != 0) & (sign != 0)),
    )


def apply_curation(dataset: Any, curation: Curation) -> Any:
    """The curated copy of a data set.

    Args:
        dataset: a ``datasets.Dataset``, row by row the pairs of the session.
        curation: from ``compute_curation``.

    Returns:
        The data set without the pairs to drop; or with ``chosen`` and ``rejected`` exchanged in the
        pairs to flip, and so for every two columns whose names differ in these words alone, such as
        ``score_chosen`` and ``score_rejected``.

    Raises:
        ValueError: for another number of rows.
    """
    if len(dataset) != curation.n_pairs:
        raise ValueError(
            f"Expected the {curation.n_pairs} pairs that were looked at, got {len(dataset)} rows."
        )
    changed = set(curation.rows)
    if curation.action == DROP:
        return dataset.select([row for row in range(len(dataset)) if row not in changed])
    names = [name for name in dataset.column_names if CHOSEN in name]
    swaps = {name: name.replace(CHOSEN, REJECTED) for name in names}
    swaps = {a: b for a, b in swaps.items() if b in dataset.column_names}
    both = swaps | {b: a for a, b in swaps.items()}

    def flip(row: dict[str, Any], number: int) -> dict[str, Any]:
        return {name: row[other] for name, other in both.items()} if number in changed else row

    return dataset.map(flip, with_indices=True, features=dataset.features, desc="Flipping pairs")


def _preferences(
    reading: PairReading, places: Int[Tensor, "some"], rows: Any
) -> tuple[Float[Tensor, "pairs"], Float[Tensor, "pairs"]]:
    """What some features say of each pair, and what all others say."""
    scores = crossfit_scores(reading, places, rows)
    others = torch.ones(reading.n_features, dtype=torch.bool)
    others[places] = False
    # As if the features preferred either answer equally often.
    weights = torch.zeros_like(scores)
    for side in (scores > 0, scores < 0):
        weights[side] = 0.5 / max(1, int(side.sum()))
    if not (scores < 0).any():
        return scores, torch.zeros_like(scores)
    return scores, crossfit_scores(reading, others.nonzero()[:, 0], rows, weights)


def _surplus(
    scores: Float[Tensor, "pairs"], rest: Float[Tensor, "pairs"], seed: int
) -> Int[Tensor, "some"]:
    """Pairs without which as many agree as disagree, supported by the others or not."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for supported in (rest > 0, rest <= 0):
        sides = [(supported & side).nonzero()[:, 0] for side in (scores > 0, scores < 0)]
        fewer, more = sorted(sides, key=len)
        order = torch.randperm(len(more), generator=generator)
        drawn.append(more[order[: len(more) - len(fewer)]])
    return torch.cat(drawn)


def _share(scores: Float[Tensor, "pairs"], counted: Bool[Tensor, "pairs"]) -> Interval:
    """Share of the counted pairs above zero; from 0 to 1 where there are none."""
    if not counted.any():
        return Interval(0.5, 0.0, 1.0)
    return statistics.proportion_interval((scores[counted] > 0).tolist())
