"""Intervals, correlations and fits. The only file that imports SciPy and scikit-learn.

Needs the ``audit`` extra. Shares have closed intervals, right also where no example counts or all
do. Every other interval of a mean, a difference or a ratio is a percentile bootstrap over examples
(``scipy.stats.bootstrap``): linear in the number of examples, never outside of what the figure can
be, and defined for every sample. BCa corrects for skew, but needs as many leave-one-out samples as
there are examples, and is undefined where a resample cannot differ. Tens of thousands of features
at once are tested with Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..extras import install_command
from ..records import Interval

if TYPE_CHECKING:
    from jaxtyping import Float

LEVEL = 0.95
RESAMPLES = 2000
# Indices held at once; the rest of the resamples follow in batches.
_BATCH = 4_000_000
_MISSING = "This needs {}, which cannot be imported. Run: " + install_command("audit")


def require() -> None:
    """Fail before the work that an interval is to end, not after it.

    Raises:
        ImportError: without the ``audit`` extra.
    """
    _scipy()


def mean_interval(values: Sequence[float], *, level: float = LEVEL, seed: int = 0) -> Interval:
    """Mean over examples.

    Where all values are equal, nothing shows how far others might lie: both ends are the value.

    Args:
        values: one per example.
        level: confidence.
        seed: of the resampling.

    Raises:
        ValueError: below two values, or if one is not finite.
        ImportError: without the ``audit`` extra.
    """
    return _bootstrap(lambda sample, axis: sample.mean(axis=axis), (values,), level, seed)


def difference_interval(
    first: Sequence[float], second: Sequence[float], *, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Mean of ``first - second``, both measured on the same examples (a paired bootstrap).

    Raises:
        ValueError: as ``mean_interval`` does, or for sequences of unlike lengths.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return mean_interval(differences, level=level, seed=seed)


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """``sum(numerators) / sum(denominators)``, resampling whole examples (a cluster bootstrap).

    Args:
        numerators: one per example.
        denominators: one per example, not negative.
        level: confidence.
        seed: of the resampling.

    Raises:
        ValueError: as ``mean_interval`` does, or if the denominators sum to zero.
    """
    if not sum(denominators) > 0:
        raise ValueError("Expected denominators with a sum above zero: there is nothing to share.")
    return _bootstrap(_ratio, (numerators, denominators), level, seed)


def ratio_of_ratios_interval(
    numerators: tuple[Sequence[float], Sequence[float]],
    denominators: tuple[Sequence[float], Sequence[float]],
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """``(sum a / sum b) / (sum c / sum d)`` of counts, resampling whole examples.

    A count that is zero where it divides is taken for one half: something that was not met once
    among so many may still be there, less than once.

    Args:
        numerators: ``a`` and ``b``, one count per example each.
        denominators: ``c`` and ``d``.
        level: confidence.
        seed: of the resampling.

    Raises:
        ValueError: as ``mean_interval`` does.
    """

    def statistic(a: Any, b: Any, c: Any, d: Any, axis: int) -> Any:
        return _ratio(a, b, axis) * _ratio(d, c, axis)

    return _bootstrap(statistic, (*numerators, *denominators), level, seed)


def proportion_interval(successes: Sequence[bool], *, level: float = LEVEL) -> Interval:
    """Share of examples, with Wilson's score interval: also where all or none succeeded.

    Raises:
        ValueError: for no example.
        ImportError: without the ``audit`` extra.
    """
    if not successes:
        raise ValueError("Expected at least one example for a share, got none.")
    result = _scipy().binomtest(sum(map(bool, successes)), len(successes))
    ends = result.proportion_ci(level, method="wilson")
    return Interval(float(result.statistic), float(ends.low), float(ends.high), level)


def share_difference_interval(
    first: Sequence[bool], second: Sequence[bool], *, level: float = LEVEL
) -> Interval:
    """Difference of two shares, both counted over the same examples.

    A bootstrap has no width where no example changed, which is no proof that none can. This has:
    one imagined change each way among two more examples, then the normal interval.

    Source: Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial
    Proportions Based on Paired Data" (2012).

    Raises:
        ValueError: for no example, or sequences of unlike lengths.
        ImportError: without the ``audit`` extra.
    """
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    if not pairs:
        raise ValueError("Expected at least one example for a difference of shares, got none.")
    gained, lost, n = pairs.count((True, False)), pairs.count((False, True)), len(pairs)
    value = (gained - lost) / n
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    width = _scipy().norm.ppf((1 + level) / 2) * ((up + down - (up - down) ** 2) / (n + 2)) ** 0.5
    low, high = max(up - down - width, -1.0), min(up - down + width, 1.0)
    return Interval(value, float(min(low, value)), float(max(high, value)), level)


def matthews_correlation(
    a: Sequence[bool], b: Sequence[bool], *, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Matthews correlation coefficient of two labelings; 0 where one of them is constant.

    Raises:
        ValueError: below two items, or for labelings of unlike lengths.
        ImportError: without the ``audit`` extra.
    """
    return _agreement(_sklearn().metrics.matthews_corrcoef, _mcc, a, b, level, seed)


def cohen_kappa(
    a: Sequence[bool], b: Sequence[bool], *, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Cohen's kappa of two labelings; 0 where one of them is constant.

    Raises:
        ValueError: below two items, or for labelings of unlike lengths.
        ImportError: without the ``audit`` extra.
    """
    return _agreement(_sklearn().metrics.cohen_kappa_score, _kappa, a, b, level, seed)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None below three points or where one side is constant.

    Raises:
        ValueError: for sequences of unlike lengths.
        ImportError: without the ``audit`` extra.
    """
    if len(x) != len(y):
        raise ValueError(f"Expected as many of each, got {len(x)} and {len(y)}.")
    if len(x) < 3 or _constant(x) or _constant(y):
        return None
    return float(_scipy().spearmanr(x, y).statistic)


def spearman_interval(
    first: Float[Tensor, "examples items"],
    second: Float[Tensor, "examples items"],
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval | None:
    """Spearman's correlation of two lists of items, each a mean over examples that are resampled.

    Args:
        first: one value per example and item.
        second: likewise, of the same examples and items.
        level: confidence.
        seed: of the resampling.

    Returns:
        None below three items, or where one list is constant.

    Raises:
        ValueError: below two examples, or if a value is not finite.
        ImportError: without the ``audit`` extra.
    """
    lists = [each.double().cpu().numpy() for each in (first, second)]
    n, n_items = lists[0].shape
    if n_items < 3 or any(_constant(each.mean(axis=0)) for each in lists):
        return None
    rank = _scipy().rankdata

    def correlate(weights: Any) -> Any:
        ranks = [rank(weights @ each, axis=1) for each in lists]
        a, b = (each - each.mean(axis=1, keepdims=True) for each in ranks)
        return (a * b).sum(axis=1) / ((a**2).sum(axis=1) * (b**2).sum(axis=1)) ** 0.5

    return weighted_interval(correlate, n, size=n_items, level=level, seed=seed)


def weighted_interval(
    statistic: Callable[[Any], Any], n: int, *, size: int, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Of whatever follows from the weights with which ``n`` examples count.

    Args:
        statistic: takes arrays of weights, ``(resamples, n)``, each row with the sum one, and gives
            one figure a row.
        n: number of examples.
        size: how many numbers it holds per resample.
        level: confidence.
        seed: of the resampling.

    Raises:
        ValueError: below two examples.
        ImportError: without the ``audit`` extra.
    """
    import numpy as np

    def resampled(drawn: Any, axis: int) -> Any:
        rows = np.atleast_2d(drawn).astype(int)
        weights = np.stack([np.bincount(row, minlength=n) for row in rows]) / n
        return statistic(weights).reshape(drawn.shape[:-1])

    return _bootstrap(resampled, (range(n),), level, seed, size=n + size)


def two_sided_p(t: Float[Tensor, "tests"], freedom: int) -> Float[Tensor, "tests"]:
    """Of Student's t.

    Raises:
        ImportError: without the ``audit`` extra.
    """
    return torch.from_numpy(2 * _scipy().t.sf(t.abs().cpu().numpy(), freedom))


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """How many standard errors an interval of Student's t reaches to either side."""
    return float(_scipy().t.ppf((1 + level) / 2, freedom))


def false_discovery_rates(p: Float[Tensor, "tests"]) -> Float[Tensor, "tests"]:
    """The smallest rate of false discoveries at which each test is among them.

    Source: Benjamini and Hochberg, "Controlling the False Discovery Rate" (1995).

    Raises:
        ImportError: without the ``audit`` extra.
    """
    stats = _scipy()
    return torch.from_numpy(stats.false_discovery_control(p.cpu().numpy())) if len(p) else p


def cluster(rows: Float[Tensor, "examples columns"], n: int, seed: int = 0) -> list[int]:
    """Number of the group that each example is in, of ``n`` at most, by k-means.

    Raises:
        ImportError: without the ``audit`` extra.
    """
    n = min(n, len(rows.unique(dim=0)))
    if n < 2:
        return [0] * len(rows)
    groups = _sklearn().cluster.KMeans(n, n_init=4, random_state=seed)
    found: list[int] = groups.fit_predict(rows.double().cpu().numpy()).tolist()
    return found


def probe_correct(
    train: Any, train_labels: Sequence[bool], test: Any, test_labels: Sequence[bool]
) -> list[bool]:
    """Which texts a logistic regression, fitted to others, classifies right.

    Coordinates are standardized by the fitted ones; scikit-learn's default regularization.

    Args:
        train: shape ``(texts, width)``.
        train_labels: one per text.
        test: shape ``(others, width)``.
        test_labels: one per text.

    Raises:
        ValueError: for labels to fit to that are all alike.
        ImportError: without the ``audit`` extra.
    """
    _sklearn()
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    probe.fit(train, [bool(label) for label in train_labels])
    found = probe.predict(test)
    return [bool(a) == bool(b) for a, b in zip(found, test_labels, strict=True)]


class Line(NamedTuple):
    """``intercept + slope * x``, and the share of the variance that it explains."""

    slope: float
    intercept: float
    r_squared: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """A line by least squares; a flat one explains all of what does not vary.

    Raises:
        ValueError: if ``x`` has fewer than two different values.
        ImportError: without the ``audit`` extra.
    """
    if len(set(x)) < 2:
        raise ValueError(
            f"Expected two different places at least to fit a line, got {len(set(x))}."
        )
    if _constant(y):
        return Line(0.0, float(y[0]), 1.0)
    result = _scipy().linregress(x, y)
    return Line(float(result.slope), float(result.intercept), float(result.rvalue) ** 2)


def slope_through_zero(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Slope of ``y = slope * x`` by least squares; None where no ``x`` differs from zero.

    Raises:
        ValueError: for sequences of unlike lengths.
    """
    weight = sum(a * a for a in x)
    products = sum(a * b for a, b in zip(x, y, strict=True))
    return products / weight if weight else None


def _bootstrap(
    statistic: Callable[..., Any],
    columns: tuple[Sequence[float], ...],
    level: float,
    seed: int,
    size: int | None = None,
) -> Interval:
    """A percentile bootstrap; ``size`` is how many numbers one resample holds at once."""
    import numpy as np

    data = [np.asarray(column, dtype=np.float64) for column in columns]
    sizes = {len(column) for column in data}
    if len(sizes) != 1:
        raise ValueError(f"Expected one value per example in each, got {sorted(sizes)} of them.")
    [n] = sizes
    if n < 2:
        raise ValueError(f"Expected at least two examples for an interval, got {n}.")
    if not all(np.isfinite(column).all() for column in data):
        raise ValueError(
            "Expected finite values, got nan or inf. Find out where they come from first."
        )
    bootstrap = _scipy().bootstrap
    value = float(statistic(*data, axis=-1))
    if all(_constant(column) for column in data):
        return Interval(value, value, value, level)
    ends = bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH // (size or n)),
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(ends.low), float(ends.high), level)


def _ratio(numerators: Any, denominators: Any, axis: int) -> Any:
    import numpy as np

    total = denominators.sum(axis=axis)
    return numerators.sum(axis=axis) / np.where(total == 0, 0.5, total)


def _agreement(
    score: Callable[[Any, Any], float],
    statistic: Callable[..., Any],
    a: Sequence[bool],
    b: Sequence[bool],
    level: float,
    seed: int,
) -> Interval:
    """The estimate by scikit-learn; the resamples, thousands of them, all at once."""
    interval = _bootstrap(statistic, (a, b), level, seed)
    undefined = _constant(a) or _constant(b)
    value = 0.0 if undefined else float(score([x > 0 for x in a], [x > 0 for x in b]))
    return replace(interval, value=value)


def _mcc(a: Any, b: Any, axis: int) -> Any:
    p, q, covariance = _margins(a, b, axis)
    return _where_defined(covariance, (p * (1 - p) * q * (1 - q)) ** 0.5)


def _kappa(a: Any, b: Any, axis: int) -> Any:
    p, q, covariance = _margins(a, b, axis)
    both_vary = (p * (1 - p) * q * (1 - q)) > 0
    return _where_defined(2 * covariance, (p + q - 2 * p * q) * both_vary)


def _margins(a: Any, b: Any, axis: int) -> tuple[Any, Any, Any]:
    p, q = a.mean(axis=axis), b.mean(axis=axis)
    return p, q, (a * b).mean(axis=axis) - p * q


def _where_defined(numerator: Any, denominator: Any) -> Any:
    import numpy as np

    defined = denominator > 0
    return np.where(defined, numerator / np.where(defined, denominator, 1.0), 0.0)


def _constant(values: Any) -> bool:
    return all(value == values[0] for value in values)


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(_MISSING.format("SciPy")) from error
    return stats


def _sklearn() -> Any:
    try:
        import sklearn
        from sklearn import cluster, metrics  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING.format("scikit-learn")) from error
    return sklearn
