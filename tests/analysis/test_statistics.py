"""Intervals against the normal one, against known truth, and by hand; degenerate samples."""

from __future__ import annotations

import math
import random
import statistics as plain
import sys
from collections.abc import Callable

import pytest

from peft_fsrl.analysis import statistics
from peft_fsrl.records import Interval


def test_a_large_sample_has_the_normal_interval() -> None:
    rng = random.Random(0)
    values = [rng.expovariate(0.5) for _ in range(4000)]
    interval = statistics.mean_interval(values, level=0.9)
    error = plain.stdev(values) / math.sqrt(len(values))
    assert interval.value == pytest.approx(plain.fmean(values))
    # 2,000 resamples leave about 0.05 standard errors of chance in an end.
    assert interval.low == pytest.approx(interval.value - 1.645 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(interval.value + 1.645 * error, abs=0.15 * error)
    assert interval.level == 0.9
    wider = statistics.mean_interval(values, level=0.99)
    assert wider.low < interval.low < interval.high < wider.high


def coverage(draw: Callable[[random.Random], Interval], truth: float, n: int = 300) -> float:
    intervals = [draw(random.Random(seed)) for seed in range(n)]
    return sum(interval.low <= truth <= interval.high for interval in intervals) / n


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    def mean(rng: random.Random) -> Interval:
        return statistics.mean_interval([rng.gauss(3.0, 2.0) for _ in range(60)], level=0.9)

    # 300 repetitions leave a standard error of 1.7 points.
    assert 0.86 <= coverage(mean, 3.0) <= 0.94


def test_a_ratio_resamples_whole_examples() -> None:
    def draw(rng: random.Random) -> tuple[list[int], list[int]]:
        # Of a text's tokens, nearly all or nearly none count: the text is what varies.
        sizes = [rng.choice((5, 40)) for _ in range(60)]
        rates = [rng.choice((0.05, 0.95)) for _ in sizes]
        counts = [
            sum(rng.random() < rate for _ in range(n)) for rate, n in zip(rates, sizes, strict=True)
        ]
        return counts, sizes

    assert 0.86 <= coverage(lambda r: statistics.ratio_interval(*draw(r), level=0.9), 0.5) <= 0.94

    def token_by_token(rng: random.Random) -> Interval:
        counts, sizes = draw(rng)
        tokens = [i < c for c, n in zip(counts, sizes, strict=True) for i in range(n)]
        return statistics.proportion_interval(tokens, level=0.9)

    assert coverage(token_by_token, 0.5, 100) < 0.6


def test_differences_are_paired() -> None:
    rng = random.Random(1)
    common = [rng.gauss(0, 100) for _ in range(200)]
    first = [c + 1 + rng.gauss(0, 0.1) for c in common]
    interval = statistics.difference_interval(first, common)
    assert interval.value == pytest.approx(
        plain.fmean(a - b for a, b in zip(first, common, strict=True))
    )
    assert 0.97 < interval.low < interval.high < 1.03
    with pytest.raises(ValueError, match="zip"):
        statistics.difference_interval([1.0, 2.0], [1.0])


def test_the_seed_fixes_an_interval() -> None:
    values = [random.Random(i).random() for i in range(50)]
    again = statistics.mean_interval(values, seed=3)
    assert statistics.mean_interval(values, seed=3) == again
    assert statistics.mean_interval(values, seed=4) != again


def test_ratios_by_hand() -> None:
    interval = statistics.ratio_interval([1, 0, 3], [2, 4, 4])
    assert interval.value == 0.4
    # The least and most that resampling three examples can give.
    assert 0.0 <= interval.low < 0.4 < interval.high <= 0.75
    enrichment = statistics.ratio_of_ratios_interval(([1, 3], [2, 6]), ([1, 1], [4, 4]))
    assert enrichment == Interval(2.0, 2.0, 2.0)
    # No pair of the category is active: half a pair is taken for none.
    unseen = statistics.ratio_of_ratios_interval(([2, 2], [4, 4]), ([0, 0], [5, 5]))
    assert unseen.value == (4 / 8) / (0.5 / 10)


def test_samples_without_spread_and_without_anything() -> None:
    assert statistics.mean_interval([2.5, 2.5, 2.5]) == Interval(2.5, 2.5, 2.5)
    assert statistics.difference_interval([1.0, 2.0], [1.0, 2.0]) == Interval(0.0, 0.0, 0.0)
    for values in ([], [1.0]):
        with pytest.raises(ValueError, match=f"at least two examples.*got {len(values)}"):
            statistics.mean_interval(values)
    with pytest.raises(ValueError, match="finite values"):
        statistics.mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="sum above zero"):
        statistics.ratio_interval([0, 0], [0, 0])
    with pytest.raises(ValueError, match="one value per example"):
        statistics.ratio_interval([1, 2, 3], [4, 5])
    # A resample may hold only examples with an empty denominator.
    assert statistics.ratio_interval([0, 1], [0, 2]).low == 0.0


def test_a_share_has_wilsons_interval() -> None:
    n, share, z = 40, 0.25, plain.NormalDist().inv_cdf(0.975)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    interval = statistics.proportion_interval([i % 4 == 0 for i in range(n)])
    assert interval.value == share
    assert (interval.low, interval.high) == pytest.approx((centre - half, centre + half))
    everyone = statistics.proportion_interval([True] * 20)
    assert everyone.value == everyone.high == 1.0
    assert everyone.low == pytest.approx(20 / (20 + z**2))
    with pytest.raises(ValueError, match="at least one example"):
        statistics.proportion_interval([])


def test_agreement_by_hand() -> None:
    # 20 both, 5 only the first, 10 only the second, 65 neither.
    a = [True] * 25 + [False] * 75
    b = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 65
    mcc = statistics.matthews_correlation(a, b)
    assert mcc.value == pytest.approx((20 * 65 - 5 * 10) / math.sqrt(25 * 75 * 30 * 70))
    chance = 0.25 * 0.30 + 0.75 * 0.70
    kappa = statistics.cohen_kappa(a, b)
    assert kappa.value == pytest.approx((0.85 - chance) / (1 - chance))
    for interval in (mcc, kappa):
        assert 0.3 < interval.low < interval.value < interval.high < 0.9
    assert statistics.matthews_correlation([True] * 4, [True, False] * 2).value == 0.0
    assert statistics.cohen_kappa([True] * 4, [True] * 4) == Interval(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="one value per example"):
        statistics.cohen_kappa([True, False], [True, False, True])


def test_rank_correlation() -> None:
    # Ranks 1 2 3 4 against 2 1 3 4: 1 - 6 (1 + 1) / (4 * 15).
    assert statistics.spearman([1, 10, 100, 1000], [5, 4, 6, 9]) == pytest.approx(0.8)
    assert statistics.spearman([1, 2], [1, 2]) is None
    assert statistics.spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="as many of each"):
        statistics.spearman([1, 2, 3], [1, 2])


def test_lines() -> None:
    line = statistics.fit_line([0, 1, 2, 3], [1, 3, 2, 6])
    # Means 1.5 and 3; sums of squares 5 and 14, of products 7.
    assert line == pytest.approx((1.4, 0.9, 7**2 / (5 * 14)))
    assert statistics.fit_line([1, 2], [4, 4]) == (0.0, 4.0, 1.0)
    with pytest.raises(ValueError, match="two different places"):
        statistics.fit_line([1, 1], [2, 3])
    assert statistics.slope_through_zero([1, 2], [3, 4]) == (1 * 3 + 2 * 4) / 5
    assert statistics.slope_through_zero([0, 0], [3, 4]) is None
    assert statistics.slope_through_zero([], []) is None


@pytest.mark.parametrize(
    ("library", "call"),
    [
        ("scipy", statistics.require),
        ("scipy", lambda: statistics.mean_interval([1.0, 2.0])),
        ("sklearn", lambda: statistics.cohen_kappa([True, False], [True, False])),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, library: str, call: Callable[[], Interval]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r'pip install "peft-fsrl\[audit\]"'):
        call()


def test_a_difference_of_shares_has_a_width_where_nothing_changed() -> None:
    same = [True] * 30 + [False] * 10
    interval = statistics.share_difference_interval(same, same)
    # Bonett and Price by hand: 1 of 42 each way.
    half = 1.959964 * math.sqrt(2 / 42 / 42)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0, -half, half))
    first = [True] * 9 + [False] * 31
    second = [False] * 6 + [True] * 7 + [False] * 27
    interval = statistics.share_difference_interval(first, second)
    assert interval.value == pytest.approx(2 / 40)
    up, down = 7 / 42, 5 / 42
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 42)
    assert (interval.low, interval.high) == pytest.approx((up - down - half, up - down + half))
    every = statistics.share_difference_interval([True] * 5, [False] * 5)
    assert every.low < every.value == every.high == 1
    with pytest.raises(ValueError, match="at least one example"):
        statistics.share_difference_interval([], [])
    with pytest.raises(ValueError, match="shorter"):
        statistics.share_difference_interval([True], [])


def test_differences_of_shares_cover_the_truth() -> None:
    rng = random.Random(5)
    covered = 0
    for _ in range(400):
        # One in fifty is gained, one in two hundred lost.
        changes = rng.choices([1, -1, 0], [0.02, 0.005, 0.975], k=200)
        gained, lost = [change > 0 for change in changes], [change < 0 for change in changes]
        interval = statistics.share_difference_interval(gained, lost)
        covered += interval.low <= 0.015 <= interval.high
    assert covered >= 0.93 * 400
