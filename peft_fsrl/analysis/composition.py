"""What kinds of features an adapter steers, against what kinds the SAE finds in the same texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..functional import clamped_update
from ..records import Interval, Record
from ..sae.frozen import FrozenSAE
from . import statistics
from .segments import TokenChunk, active_adapter, active_sae, only_layer, stream_tokens
from .session import Session

if TYPE_CHECKING:
    from jaxtyping import Float, Int

OTHER = "other"
_SEGMENTS = ("prompt", "prompt_chosen", "prompt_rejected")


@dataclass(frozen=True)
class CategoryShare(Record):
    """A category's share among the steered features against its share among the active ones.

    Both count (token, feature) pairs: a feature counts wherever it is steered, or active.

    Attributes:
        category: its name; ``"other"`` for features in no category.
        n_features: features of the SAE in it.
        steered: pairs of the category that are steered.
        n_steered: all steered pairs.
        active: pairs of the category that are active in the SAE.
        n_active: all active pairs.
        steered_share: ``steered / n_steered``.
        active_share: ``active / n_active``.
        enrichment: the first over the second.
    """

    category: str
    n_features: int
    steered: int
    n_steered: int
    active: int
    n_active: int
    steered_share: Interval
    active_share: Interval
    enrichment: Interval


@dataclass(frozen=True)
class Composition(Record):
    """What kinds of features an adapter steers; intervals are bootstrapped over examples.

    Attributes:
        segment: the tokens that count; see ``Usage``.
        n_tokens: real tokens.
        n_examples: texts that they come from.
        shares: one entry per category, ``"other"`` last.
    """

    segment: str
    n_tokens: int
    n_examples: int
    shares: tuple[CategoryShare, ...]


def compute_compositions(
    session: Session,
    categories: Mapping[str, Sequence[int]],
    *,
    segments: Sequence[str] = _SEGMENTS,
) -> tuple[Composition, ...]:
    """Shares of categories among steered and active features, bootstrapped over examples.

    Pairs of token and feature count. A feature may be in two categories and then counts in both, so
    shares need not sum to one; ``"other"`` has the features in none. Where nothing is steered on a
    segment, its shares are 0 in an interval from 0 to 1. Kept are a few counts per example. Of an
    adapter that stores only some features, only these count as active.

    Args:
        session: its model has one FSRL layer.
        categories: feature indices by category.
        segments: see ``Usage``.

    Returns:
        One record per segment, in their order.

    Raises:
        ValueError: for a category named ``"other"``, fewer than two examples, a segment
            without a token that counts, and as ``stream_tokens`` does.
        IndexError: for a feature that the SAE does not have.
        ImportError: without the ``audit`` extra.
    """
    statistics.require()
    sae = active_sae(session.model)
    columns = membership(sae, categories)
    # Steered and active pairs of every example; one of which no token counts has zeros.
    shape = (len(segments), 2, len(session.rows), columns.shape[1])
    pairs = torch.zeros(shape, dtype=torch.float64)
    n_tokens = torch.zeros(len(segments), dtype=torch.long)

    def add(chunk: TokenChunk) -> None:
        members, of_features = chunk.members.double(), columns.to(chunk.v.device)
        for number, quantity in enumerate((chunk.v != 0, chunk.active())):
            pairs[:, number, chunk.row] += (members @ (quantity.double() @ of_features)).cpu()
        n_tokens.add_(chunk.members.sum(dim=1).cpu())

    stream_tokens(session, segments, add, "composition")
    sizes = _sizes(categories, sae.info.d_sae)
    compositions = []
    for segment, n, (steered, active) in zip(segments, n_tokens.tolist(), pairs, strict=True):
        if not n:
            raise ValueError(f"The segment {segment!r} has no token that counts.")
        # The last column has all features.
        shares = tuple(
            _category_share(name, size, steered.T[[place, -1]], active.T[[place, -1]], session.seed)
            for place, (name, size) in enumerate(sizes.items())
        )
        compositions.append(Composition(segment, n, len(session.rows), shares))
    return tuple(compositions)


@dataclass(frozen=True)
class Firing(Record):
    """How many features of a category are active at a token, before steering and after.

    Attributes:
        category: its name; ``"other"`` for features in no category.
        n_features: features of the SAE in it.
        base: mean number of them that the SAE finds at a token.
        trained: the same after steering, counting ``f' != 0``.
        change: ``trained - base``, of the same tokens.
        base_share: share of the category among all active features, before.
        trained_share: the same after.
    """

    category: str
    n_features: int
    base: Interval
    trained: Interval
    change: Interval
    base_share: float
    trained_share: float


def measure_firing(
    session: Session, categories: Mapping[str, Sequence[int]], *, segment: str = "prompt_chosen"
) -> tuple[Firing, ...]:
    """How often each category's features fire, in the base model and in the trained one.

    At the steered layer both read the same ``x``: what differs is ``f`` against ``f' = f + v``,
    kept from falling below zero where the adapter keeps it. Intervals are bootstrapped over texts.

    Args:
        session: its model has one FSRL layer. Its data may be plain texts; see ``Session``.
        categories: feature indices by category.
        segment: see ``Usage``.

    Returns:
        One record per category, ``"other"`` last.

    Raises:
        ValueError: for a category named ``"other"``, fewer than two texts, a segment without a
            token that counts, and as ``stream_tokens`` does.
        IndexError: for a feature that the SAE does not have.
        ImportError: without the ``audit`` extra.
    """
    statistics.require()
    sae, layer = active_sae(session.model), only_layer(session.model)
    adapter: Any = layer.fsrl_adapter[active_adapter(layer)]
    clamps, columns = adapter.non_negative and not sae.signed, membership(sae, categories)
    # Before and after, of every text.
    fired = torch.zeros(2, len(session.rows), columns.shape[1], dtype=torch.float64)
    n_tokens = torch.zeros(len(session.rows), dtype=torch.float64)

    def add(chunk: TokenChunk) -> None:
        f = chunk.acts()
        after = f + (clamped_update(chunk.v, f) if clamps else chunk.v)
        members = chunk.members[0].double()
        for number, acts in enumerate((f, after)):
            counts = members @ ((acts != 0).double() @ columns.to(acts.device))
            fired[number, chunk.row] += counts.cpu()
        n_tokens[chunk.row] += members.sum().cpu()

    stream_tokens(session, [segment], add, "firing")
    if not n_tokens.sum():
        raise ValueError(f"The segment {segment!r} has no token that counts.")
    tokens, totals = n_tokens.tolist(), fired.sum(dim=1)

    def rate(counts: Tensor) -> Interval:
        return statistics.ratio_interval(counts.tolist(), tokens, seed=session.seed)

    return tuple(
        Firing(
            category=name,
            n_features=size,
            base=rate(fired[0, :, place]),
            trained=rate(fired[1, :, place]),
            change=rate(fired[1, :, place] - fired[0, :, place]),
            base_share=float(totals[0, place] / totals[0, -1].clamp(min=0.5)),
            trained_share=float(totals[1, place] / totals[1, -1].clamp(min=0.5)),
        )
        for place, (name, size) in enumerate(_sizes(categories, sae.info.d_sae).items())
    )


@dataclass(frozen=True, eq=False)
class FeatureCounts:
    """On how many tokens of a segment each feature is steered, and active.

    Attributes:
        segment: the tokens that count; see ``Usage``.
        n_tokens: how many there are.
        n_examples: texts that they come from.
        steered: tokens on which the adapter steers each feature of the SAE, shape ``(d_sae,)``.
        active: tokens on which the SAE finds it, shape ``(d_sae,)``.
    """

    segment: str
    n_tokens: int
    n_examples: int
    steered: Int[Tensor, "d_sae"]
    active: Int[Tensor, "d_sae"]


def count_features(
    session: Session, *, segments: Sequence[str] = _SEGMENTS
) -> dict[str, FeatureCounts]:
    """Counts per feature by segment, from which ``composition_of`` makes shares for any labels.

    Raises:
        ValueError: as ``stream_tokens`` does.
    """
    sae = active_sae(session.model)
    shape = (len(segments), sae.n_features)
    totals = {name: torch.zeros(shape, dtype=torch.float64) for name in ("steered", "active")}
    n_tokens = torch.zeros(len(segments), dtype=torch.long)

    def add(chunk: TokenChunk) -> None:
        members = chunk.members.double()
        totals["steered"] += (members @ (chunk.v != 0).double()).cpu()
        totals["active"] += (members @ chunk.active().double()).cpu()
        n_tokens.add_(chunk.members.sum(dim=1).cpu())

    stream_tokens(session, segments, add, "feature counts")

    def whole(counts: Tensor) -> Tensor:
        return torch.zeros(sae.info.d_sae, dtype=torch.long).index_add(
            0, sae.feature_index, counts.long()
        )

    return {
        segment: FeatureCounts(
            segment,
            int(n_tokens[number]),
            len(session.rows),
            whole(totals["steered"][number]),
            whole(totals["active"][number]),
        )
        for number, segment in enumerate(segments)
    }


class Share(NamedTuple):
    """A category's share among the steered and among the active pairs of token and feature.

    ``enrichment`` is the first over the second. A share of nothing is 0, and where no pair of the
    category is active, half a pair is taken for none.
    """

    steered_share: float
    active_share: float
    enrichment: float


def composition_of(
    counts: FeatureCounts, categories: Mapping[str, Sequence[int]]
) -> dict[str, Share]:
    """The shares that ``compute_compositions`` finds, without intervals and without the model.

    Args:
        counts: from ``count_features``.
        categories: feature indices by category; each of these features counts once per category.

    Returns:
        By category, ``"other"`` last.

    Raises:
        ValueError: for a category named ``"other"``.
        IndexError: for a feature that the SAE does not have.
    """
    _refuse_other(categories)
    total = torch.stack([counts.steered, counts.active])
    n_steered, n_active = total.sum(dim=1).tolist()
    in_none = torch.ones(total.shape[1], dtype=torch.bool)
    found = {}
    for name, features in categories.items():
        index = torch.tensor(sorted(set(features)), dtype=torch.long)
        if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < total.shape[1]:
            raise IndexError(
                f"Category {name!r} has features {int(index[0])} to {int(index[-1])}, but the SAE "
                f"has 0 to {total.shape[1] - 1}."
            )
        in_none[index] = False
        found[name] = total[:, index].sum(dim=1).tolist()
    found[OTHER] = total[:, in_none].sum(dim=1).tolist()
    shares = {}
    for name, (steered, active) in found.items():
        above, below = steered / max(n_steered, 0.5), active / max(n_active, 0.5)
        enrichment = above * max(n_active, 0.5) / max(active, 0.5)
        shares[name] = Share(above, below, enrichment)
    return shares


def _category_share(
    name: str,
    n_features: int,
    steered: Float[Tensor, "2 examples"],
    active: Float[Tensor, "2 examples"],
    seed: int,
) -> CategoryShare:
    (of_category, of_all), (found, found_all) = steered.tolist(), active.tolist()
    active_share = _share(found, found_all, seed)
    if sum(of_all):
        enrichment = statistics.ratio_of_ratios_interval(
            (of_category, of_all), (found, found_all), seed=seed
        )
    else:
        enrichment = Interval(0.0, 0.0, 1 / max(active_share.value, 0.5 / max(sum(found_all), 0.5)))
    return CategoryShare(
        category=name,
        n_features=n_features,
        steered=round(sum(of_category)),
        n_steered=round(sum(of_all)),
        active=round(sum(found)),
        n_active=round(sum(found_all)),
        steered_share=_share(of_category, of_all, seed),
        active_share=active_share,
        enrichment=enrichment,
    )


def _share(part: Sequence[float], whole: Sequence[float], seed: int) -> Interval:
    if not sum(whole):
        return Interval(0.0, 0.0, 1.0)
    return statistics.ratio_interval(part, whole, seed=seed)


def membership(
    sae: FrozenSAE, categories: Mapping[str, Sequence[int]]
) -> Float[Tensor, "n_features columns"]:
    """A column per category, one for the features in none, and one for all.

    Raises:
        ValueError: for a category named ``"other"``.
        IndexError: for a feature that the SAE does not have.
    """
    _refuse_other(categories)
    columns = torch.zeros(sae.n_features, len(categories) + 2, dtype=torch.float64)
    for number, features in enumerate(categories.values()):
        columns[sae.positions(features), number] = 1.0
    columns[:, -2] = (columns.sum(dim=1) == 0).double()
    columns[:, -1] = 1.0
    return columns


def _sizes(categories: Mapping[str, Sequence[int]], d_sae: int) -> dict[str, int]:
    held = {feature for features in categories.values() for feature in features}
    sizes = {name: len(set(features)) for name, features in categories.items()}
    return {**sizes, OTHER: d_sae - len(held)}


def _refuse_other(categories: Mapping[str, Sequence[int]]) -> None:
    if OTHER in categories:
        raise ValueError(
            f"The name {OTHER!r} is kept for the features in no category. Rename the category."
        )
