"""Which features separate chosen from rejected answers, before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...records import Interval, Record
from .. import statistics
from ..labels import Context, collect_evidence
from ..segments import active_sae
from ..session import CHOSEN, REJECTED, Session
from .probe import crossfit_scores
from .reading import PairReading, read_pairs

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

logger = logging.getLogger(__name__)

# Below so many pairs nothing is said at all, and of a feature that differs in fewer neither: a test
# of a mean needs some values.
ENOUGH_PAIRS, ENOUGH_DIFFERENCES = 20, 10
# Share of false ones that is accepted among the features that are said to separate.
FALSE_DISCOVERIES = 0.05
# A topic with fewer pairs is put together with others like it.
_SMALLEST_TOPIC = 10
EVERYTHING = "all features"
# Of so many features the shares of categories are told.
_MOST_SHARED = 512


@dataclass(frozen=True)
class FeatureContrast(Record):
    """How a feature separates chosen from rejected answers.

    Attributes:
        feature: index in the SAE.
        difference: of its mean activation, chosen minus rejected, at the same positions, for
            answers of equal length, with equal weight for every topic.
        whole: the same without any control: the mean over all tokens and all pairs.
        effect: ``difference`` in standard deviations of a pair's difference.
        auroc: probability that it is more active in the chosen answer of a pair, at the same
            positions; a tie counts half.
        q: smallest false-discovery rate at which it is among those that separate.
        pull: how much the SimPO loss of a pair falls, to first order, per unit of ``v`` of this
            feature at every token; negative where suppression lowers it.
        pull_per_token: the same with the sign that suits each token best.
        density: share of an answer's tokens at which it is active, mean over both answers of all
            pairs.
        label: what it detects, if known.
    """

    feature: int
    difference: Interval
    whole: float
    effect: float
    auroc: Interval
    q: float
    pull: Interval
    pull_per_token: float
    density: float
    label: str | None = None

    @property
    def separates(self) -> bool:
        """Whether it is among those that separate."""
        return self.q <= FALSE_DISCOVERIES


@dataclass(frozen=True)
class CategoryContrast(Record):
    """How the features of a category separate chosen from rejected answers, together.

    Attributes:
        category: its name; ``"all features"`` for all.
        n_features: how many it has.
        n_tested: how many of them differ in enough pairs to be tested.
        n_separating: how many of these separate, at a false-discovery rate of 5 %.
        share: of the sum, over the features that separate (the strongest 512), of squared mean
            differences in root mean squares, without any control; None where none does.
        accuracy: share of pairs in which these features alone prefer the chosen answer, by a probe
            fitted on other pairs: one half if they know nothing of the preference. A category whose
            features also hear something else knows of that too.
    """

    category: str
    n_features: int
    n_tested: int
    n_separating: int
    share: Interval | None
    accuracy: Interval


@dataclass(frozen=True)
class FeatureExamples(Record):
    """Where a feature is active, in the pairs that it separates most.

    Attributes:
        feature: index in the SAE.
        chosen: in chosen answers, of the pairs where these have most of it.
        rejected: in rejected answers, of the pairs where those have.
    """

    feature: int
    chosen: tuple[Context, ...]
    rejected: tuple[Context, ...]


@dataclass(frozen=True)
class DataContrast(Record):
    """What a preference set prefers, in the features of an SAE on the base model.

    Attributes:
        dataset: its name.
        fingerprint: of the SAE.
        n_pairs: different preference pairs.
        n_topics: kinds of prompts, each with the same weight.
        longer: share of pairs whose chosen answer is the longer one; a tie counts half.
        length_controlled: False where the lengths vary too little to be told from preference.
        n_tested: features that differ in enough pairs to be tested.
        n_separating: how many of these separate, at a false-discovery rate of 5 %.
        features: those tested, largest effect in either direction first, cut at some number.
        categories: all features first.
        examples: of the first features.
    """

    dataset: str
    fingerprint: str
    n_pairs: int
    n_topics: int
    longer: Interval
    length_controlled: bool
    n_tested: int
    n_separating: int
    features: tuple[FeatureContrast, ...]
    categories: tuple[CategoryContrast, ...]
    examples: tuple[FeatureExamples, ...]


@dataclass(frozen=True, eq=False)
class Contrasts:
    """The contrast of every feature of an SAE, in the order of its own; see ``FeatureContrast``.

    Attributes:
        difference: shape ``(n_features,)``, as all others.
        error: its standard error.
        effect: zero where nothing differs.
        q: one for what was not tested.
        tested: whether it differs in enough pairs.
        leverage: with which each pair's difference enters ``difference``, a sum over pairs; shape
            ``(pairs,)``.
        freedom: degrees of freedom of the test.
        n_topics: how many there were.
        length_controlled: see ``DataContrast``.
    """

    difference: Float[Tensor, "n_features"]
    error: Float[Tensor, "n_features"]
    effect: Float[Tensor, "n_features"]
    q: Float[Tensor, "n_features"]
    tested: Tensor
    leverage: Float[Tensor, "pairs"]
    freedom: int
    n_topics: int
    length_controlled: bool

    @property
    def separates(self) -> Tensor:
        """Which features separate."""
        return self.tested & (self.q <= FALSE_DISCOVERIES)


def compute_contrast(
    session: Session,
    *,
    labels: Mapping[int, str] | None = None,
    categories: Mapping[str, Sequence[int]] | None = None,
    topics: Sequence[object] | None = None,
    n_topics: int = 8,
    n_features: int = 50,
    n_examples: int = 8,
    out: str | Path | None = None,
    dataset_name: str = "data",
) -> DataContrast:
    """What a preference set will teach, read off the base model before any training.

    Each feature's mean activation over an answer is compared within pairs, which have the same
    prompt. Position is held fixed by counting the same number of tokens on both sides, length and
    topic by a regression of the differences on ``log(n_chosen / n_rejected)`` and on the topic: the
    test is of its prediction for equal lengths, with equal weight for every topic. Errors are
    MacKinnon and White's HC3, right for pairs of unlike spread; the rate of false discoveries is
    Benjamini and Hochberg's. A pair that is there more than once counts once.

    Args:
        session: its model has one FSRL layer, trained or not: everything is about the base model.
        labels: what features detect, where known.
        categories: features by category.
        topics: of each pair; None tells kinds of prompts by the base model's activations on them.
        n_topics: how many kinds to tell at most; 1 for no control.
        n_features: how many features to keep.
        n_examples: of how many of them to keep examples.
        out: folder in which what is read of the pairs is kept, so that a call that was interrupted
            goes on. None keeps nothing.
        dataset_name: shown in the record.

    Raises:
        ValueError: for fewer than 20 different pairs, another number of topics than of pairs, and
            as ``read_pairs`` does.
        IndexError: for a feature in a category that the SAE does not have.
        OSError: if nothing can be written to ``out``.
        ImportError: without the ``audit`` extra.
    """
    statistics.require()
    different = require_pairs(session)
    if topics is not None and len(topics) != len(session.rows):
        raise ValueError(
            f"Expected one topic for each of {len(session.rows)} pairs, got {len(topics)}."
        )
    if len(different) < len(session.rows):
        logger.warning(
            "%d of %d pairs are different; the others are not counted again.",
            len(different),
            len(session.rows),
        )
        topics = None if topics is None else [topics[row] for row in different]
        session = replace(session, dataset=[session.rows[row] for row in different])
    sae = active_sae(session.model)
    places = {name: sae.positions(members) for name, members in (categories or {}).items()}
    reading = read_pairs(session, None if out is None else Path(out))
    found = contrast_features(reading, topics=topics, n_topics=n_topics, seed=session.seed)
    strongest = found.effect.abs().argsort(descending=True)
    order = strongest[found.tested[strongest]][:n_features]
    index = sae.feature_index.tolist()
    features = tuple(
        replace(each, feature=index[each.feature], label=(labels or {}).get(index[each.feature]))
        for each in describe_features(reading, found, order, session.seed)
    )
    shared = strongest[found.separates[strongest]][:_MOST_SHARED]
    differences = reading.dense(shared)
    everything = {EVERYTHING: torch.arange(reading.n_features), **places}
    sizes = {name: len(set(members)) for name, members in (categories or {}).items()}
    lengths = reading.lengths.double()
    longer = (lengths[:, 0] - lengths[:, 1]).sign() / 2 + 0.5
    return DataContrast(
        dataset=dataset_name,
        fingerprint=sae.info.fingerprint,
        n_pairs=reading.n_pairs,
        n_topics=found.n_topics,
        longer=statistics.mean_interval(longer.tolist(), seed=session.seed),
        length_controlled=found.length_controlled,
        n_tested=int(found.tested.sum()),
        n_separating=int(found.separates.sum()),
        features=features,
        categories=tuple(
            CategoryContrast(
                name,
                sizes.get(name, len(members)),
                int(found.tested[members].sum()),
                int(found.separates[members].sum()),
                _share(differences, torch.isin(shared, members), session.seed),
                _accuracy(crossfit_scores(reading, members, session.rows), session.seed),
            )
            for name, members in everything.items()
        ),
        examples=_find_examples(session, reading, order[:n_examples], index),
    )


def require_pairs(session: Session) -> list[int]:
    """The numbers of the different pairs, each where it is first.

    Raises:
        ValueError: for fewer than 20.
    """
    first: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(session.rows):
        first.setdefault((row["prompt"], row[CHOSEN], row[REJECTED]), number)
    if len(first) < ENOUGH_PAIRS:
        raise ValueError(
            f"Expected at least {ENOUGH_PAIRS} different preference pairs to measure their "
            f"contrast, got {len(first)}. Give more."
        )
    return list(first.values())


def contrast_features(
    reading: PairReading, *, topics: Sequence[object] | None, n_topics: int, seed: int
) -> Contrasts:
    """``difference`` of every feature with its test; see ``compute_contrast``."""
    design, kinds, controlled = _design(reading, topics, n_topics, seed)
    inverse = torch.linalg.pinv(design)
    leverage = inverse[0]
    values = reading.matched.double()
    coefficients = torch.stack([reading.sums(values * row[reading.pair]) for row in inverse])
    # HC3: each residual as if its pair had been left out of the fit.
    kept = (1 - (design * inverse.T).sum(dim=1)).clamp(min=1e-3)
    variance = _residual_sum(reading, design, coefficients, (leverage / kept) ** 2)
    freedom = len(design) - design.shape[1]
    spread = (
        _residual_sum(reading, design, coefficients, kept.new_ones(len(kept))) / freedom
    ) ** 0.5
    difference, error = coefficients[0], variance**0.5
    tested = reading.sums(values != 0) >= ENOUGH_DIFFERENCES
    p = torch.ones_like(difference)
    p[tested] = statistics.two_sided_p(difference[tested] / error[tested], freedom)
    q = torch.ones_like(p)
    q[tested] = statistics.false_discovery_rates(p[tested])
    effect = torch.where(spread > 0, difference / spread, 0.0)
    return Contrasts(difference, error, effect, q, tested, leverage, freedom, kinds, controlled)


def describe_features(
    reading: PairReading, found: Contrasts, places: Int[Tensor, "some"], seed: int
) -> tuple[FeatureContrast, ...]:
    """Records of some features, named by their place among the SAE's own."""
    n = reading.n_pairs
    differences = reading.dense(places)
    wholes = reading.sums(reading.whole) / n
    slopes, squares, absolute = reading.slopes / n
    slope_errors = ((squares - slopes.square()).clamp(min=0) / (n - 1)) ** 0.5
    reach = statistics.t_quantile(found.freedom)
    slope_reach = statistics.t_quantile(n - 1)
    records = []
    for column, place in enumerate(places.tolist()):
        wins = (differences[:, column].sign() / 2 + 0.5).tolist()
        records.append(
            FeatureContrast(
                feature=place,
                difference=_around(found.difference[place], reach * found.error[place]),
                whole=float(wholes[place]),
                effect=float(found.effect[place]),
                auroc=statistics.mean_interval(wins, seed=seed),
                q=float(found.q[place]),
                pull=_around(-slopes[place], slope_reach * slope_errors[place]),
                pull_per_token=float(absolute[place]),
                density=float(reading.density[place]) / (2 * n),
            )
        )
    return tuple(records)


def _design(
    reading: PairReading, topics: Sequence[object] | None, n_topics: int, seed: int
) -> tuple[Float[Tensor, "pairs columns"], int, bool]:
    """Ones, all topics but one, which is minus the others, and the log ratio of the lengths.

    So the first coefficient is what is expected at equal lengths, as the plain mean over topics.
    Beside it, how many topics there are, and whether the lengths are controlled.
    """
    lengths = reading.lengths.clamp(min=1).double()
    ratio = (lengths[:, 0] / lengths[:, 1]).log()
    columns = [torch.ones_like(ratio)]
    if topics is None:
        most = max(1, min(n_topics, reading.n_pairs // (2 * _SMALLEST_TOPIC)))
        topics = statistics.cluster(reading.prompts, most, seed)
    names = list(dict.fromkeys(topics))
    number = torch.tensor([names.index(topic) for topic in topics])
    counts = number.bincount(minlength=len(names))
    # The small ones together; where even these are few, with the smallest of the others.
    small = counts < _SMALLEST_TOPIC
    if 0 < int(counts[small].sum()) < _SMALLEST_TOPIC and not small.all():
        small[torch.where(small, reading.n_pairs, counts).argmin()] = True
    number = torch.where(small[number], len(names), number)
    used, number = number.unique(return_inverse=True)
    for topic in range(len(used) - 1):
        columns.append((number == topic).double() - (number == len(used) - 1).double())
    plain, full = torch.stack(columns, dim=1), torch.stack([*columns, ratio], dim=1)
    if not ratio.any():
        return plain, len(used), True
    controlled = _resting_on(full) >= min(ENOUGH_DIFFERENCES, _resting_on(plain) / 2)
    return full if controlled else plain, len(used), controlled


def _resting_on(design: Float[Tensor, "pairs columns"]) -> float:
    """How many pairs the first coefficient rests on; 0 where it does not follow from them."""
    leverage = torch.linalg.pinv(design)[0]
    told = leverage @ design
    told[0] -= 1
    weights = leverage.square()
    found = weights.sum().square() / weights.square().sum()
    return float(found) if told.abs().max() < 1e-6 else 0.0


def _residual_sum(
    reading: PairReading, design: Tensor, coefficients: Tensor, weights: Tensor
) -> Float[Tensor, "n_features"]:
    """``sum_i w_i (d_i - X_i b)^2`` of every feature, from the pairs that differ alone."""
    values, weight = reading.matched.double(), weights[reading.pair]
    squares = reading.sums(weight * values**2)
    products = torch.stack([reading.sums(weight * values * x[reading.pair]) for x in design.T])
    fitted = torch.einsum("pf,pq,qf->f", coefficients, (design.T * weights) @ design, coefficients)
    return (squares - 2 * (products * coefficients).sum(dim=0) + fitted).clamp(min=0)


def _share(
    differences: Float[Tensor, "pairs features"], inside: Bool[Tensor, "features"], seed: int
) -> Interval | None:
    """A category's part of the squared effects, mean over root mean square of the differences."""
    n_pairs, n_features = differences.shape
    if not n_features:
        return None
    values, mine = differences.numpy(), inside.numpy()

    def share(weights: Any) -> Any:
        means, squares = weights @ values, weights @ values**2
        effects = means**2 / np.where(squares > 0, squares, 1.0)
        return effects[:, mine].sum(axis=1) / effects.sum(axis=1)

    return statistics.weighted_interval(share, n_pairs, size=3 * n_features, seed=seed)


def _accuracy(scores: Float[Tensor, "pairs"], seed: int) -> Interval:
    return statistics.mean_interval((scores.sign() / 2 + 0.5).tolist(), seed=seed)


def _around(value: Tensor, reach: Tensor) -> Interval:
    middle, half = float(value), float(reach)
    return Interval(middle, middle - half, middle + half, statistics.LEVEL)


def _find_examples(
    session: Session, reading: PairReading, places: Tensor, index: Sequence[int], n: int = 2
) -> tuple[FeatureExamples, ...]:
    """Contexts of each feature from the pairs that differ most, either way."""
    found = []
    columns = reading.dense(places).T
    with session.bar("examples", len(columns), unit="feature") as bar:
        for place, column in zip(places.tolist(), columns, strict=True):
            sides = {}
            for side, signed in ((CHOSEN, column), (REJECTED, -column)):
                top = [row for row in signed.topk(n).indices.tolist() if signed[row] > 0]
                sides[side] = _contexts(session, top, index[place], side) if top else ()
            found.append(FeatureExamples(index[place], sides[CHOSEN], sides[REJECTED]))
            bar.update()
    return tuple(found)


def _contexts(
    session: Session, rows: Sequence[int], feature: int, side: str
) -> tuple[Context, ...]:
    some = replace(session, dataset=[session.rows[row] for row in rows], progress=False)
    [evidence] = collect_evidence(
        some, [feature], n_contexts=len(rows), answer=side, held_out=0.0, in_answers=True
    )
    return evidence.contexts
