"""Agreement against counts by hand, and redrawn labels against worlds whose truth is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, matthews_corrcoef

from peft_fsrl.analysis import statistics
from peft_fsrl.analysis.composition import FeatureCounts, composition_of
from peft_fsrl.analysis.labels import (
    Agreement,
    ErrorRates,
    FeatureLabel,
    Labels,
    compare_judges,
    compare_labels,
    draw_labels,
    error_rates,
    error_rates_for_mcc,
    propagate,
    propagate_ablation,
    propagate_composition,
    strata_by_use,
)
from peft_fsrl.records import Interval


def labels_of(
    truth: Mapping[str, Sequence[bool]],
    source: str = "judge",
    features: Sequence[int] | None = None,
    d_sae: int | None = None,
) -> Labels:
    """Labels from a membership list per category."""
    n = len(next(iter(truth.values())))
    index = range(n) if features is None else features
    rows = [
        FeatureLabel(feature, None, tuple(c for c in truth if truth[c][place]), None)
        for place, feature in enumerate(index)
    ]
    return Labels(source, tuple(truth), d_sae, None, tuple(rows))


def counts_of(
    steered: Sequence[int], active: Sequence[int], segment: str = "chosen"
) -> FeatureCounts:
    return FeatureCounts(segment, 1000, 10, torch.tensor(steered), torch.tensor(active))


# Agreement


def test_confusion_mcc_and_kappa_by_hand() -> None:
    table = [(True, True)] * 6 + [(True, False)] * 2 + [(False, True)] * 1 + [(False, False)] * 11
    judged = labels_of({"style": [a for a, _ in table]}, "judge")
    people = labels_of({"style": [b for _, b in table]}, "people")
    # Features that only one of them labels do not count.
    extra = labels_of({"style": [True] * 3}, "judge", features=[50, 51, 52])
    judged = Labels("judge", ("style",), None, None, judged.features + extra.features)
    [found] = compare_labels(judged, people)
    assert (found.both, found.only_judged, found.only_reference, found.neither) == (6, 2, 1, 11)
    assert (found.category, found.judged, found.reference) == ("style", "judge", "people")
    mcc = (6 * 11 - 2 * 1) / math.sqrt(8 * 7 * 13 * 12)
    assert found.mcc.value == pytest.approx(mcc)
    expected = (8 / 20) * (7 / 20) + (12 / 20) * (13 / 20)
    assert found.kappa.value == pytest.approx((17 / 20 - expected) / (1 - expected))
    assert found.mcc.low < mcc < found.mcc.high <= 1
    [narrow] = compare_labels(judged, people, level=0.5)
    assert found.mcc.low < narrow.mcc.low < narrow.mcc.high < found.mcc.high
    assert error_rates(found) == ErrorRates("style", 6, 2, 1, 11, exact=False)


def test_what_is_resampled_is_what_scikit_learn_computes() -> None:
    for table in itertools.product(range(3), repeat=4):
        a = np.repeat([1.0, 1.0, 0.0, 0.0], table)
        b = np.repeat([1.0, 0.0, 1.0, 0.0], table)
        if len(a) < 2:
            continue
        mcc, kappa = statistics._mcc(a, b, axis=-1), statistics._kappa(a, b, axis=-1)
        if len(set(a)) == 1 or len(set(b)) == 1:
            assert mcc == kappa == 0
        else:
            assert mcc == pytest.approx(matthews_corrcoef(a, b), abs=1e-12)
            assert kappa == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)


def test_judges_against_one_another() -> None:
    judges = [
        labels_of(
            {"style": [i % n == 0 for i in range(12)], "tone": [i < n for i in range(12)]}, n_
        )
        for n, n_ in ((2, "a"), (3, "b"), (4, "c"))
    ]
    found = compare_judges(judges, ["tone", "style"])
    assert [(f.judged, f.reference, f.category) for f in found] == [
        (a, b, c) for a, b in (("a", "b"), ("a", "c"), ("b", "c")) for c in ("tone", "style")
    ]
    # Multiples of 2 and of 3 below 12: of both 2, of either alone 4 and 2.
    assert (found[1].both, found[1].only_judged, found[1].only_reference) == (2, 4, 2)


def test_comparisons_that_cannot_be() -> None:
    a = labels_of({"style": [True, False]}, "a", d_sae=2)
    with pytest.raises(ValueError, match=r"categories that both know.*'b' knows \['tone'\]"):
        compare_labels(a, labels_of({"tone": [True, False]}, "b"))
    with pytest.raises(ValueError, match="categories that both know"):
        compare_labels(a, a, ["tone"])
    with pytest.raises(ValueError, match=r"both label, found 1: 'a' labels 2, 'b' labels 2"):
        compare_labels(a, labels_of({"style": [True, True]}, "b", features=[1, 2]))
    with pytest.raises(ValueError, match="an SAE with 2 features, but this one has 3"):
        compare_labels(a, labels_of({"style": [True, True]}, "b", d_sae=3))
    with pytest.raises(ValueError, match="at least two labelings"):
        compare_judges([a])


# Rates


@pytest.mark.parametrize(("p", "q"), [(0.1, 0.1), (0.3, 0.2), (0.05, 0.2)])
def test_a_table_with_a_given_mcc(p: float, q: float) -> None:
    rates = error_rates_for_mcc("style", 0.448, judged_share=q, true_share=p, n=500)
    assert not rates.exact
    both, fp, fn, tn = rates.both, rates.only_judged, rates.only_true, rates.neither
    assert both + fp + fn + tn == pytest.approx(500)
    assert (both + fp, both + fn) == (pytest.approx(500 * q), pytest.approx(500 * p))
    denominator = math.sqrt((both + fp) * (both + fn) * (tn + fp) * (tn + fn))
    assert (both * tn - fp * fn) / denominator == pytest.approx(0.448)
    assert min(both, fp, fn, tn) >= 0


def test_rates_at_the_ends() -> None:
    perfect = error_rates_for_mcc("c", 1.0, judged_share=0.3)
    assert (perfect.only_judged, perfect.only_true) == pytest.approx((0, 0))
    assert perfect.exact
    chance = error_rates_for_mcc("c", 0.0, judged_share=0.3, true_share=0.2)
    assert chance.both == pytest.approx(0.06)
    # With 5 % against 40 %, even the best judge cannot correlate by much.
    largest = (0.05 - 0.02) / math.sqrt(0.05 * 0.95 * 0.4 * 0.6)
    with pytest.raises(ValueError, match=f"cannot exceed {largest:.3f}, got 0.448"):
        error_rates_for_mcc("c", 0.448, judged_share=0.4, true_share=0.05)
    for wrong in ({"judged_share": 0.0}, {"judged_share": 0.5, "true_share": 1.0}):
        with pytest.raises(ValueError, match="Expected shares between 0 and 1"):
            error_rates_for_mcc("c", 0.4, **wrong)
    with pytest.raises(ValueError, match="a coefficient from 0 to 1"):
        error_rates_for_mcc("c", -0.1, judged_share=0.4)


# Draws


def test_draws_have_the_rates() -> None:
    judged = labels_of(
        {"style": [True] * 200 + [False] * 800, "tone": [i < 5 for i in range(1000)]}
    )
    rates = ErrorRates("style", 0.15, 0.05, 0.08, 0.72, exact=True)
    kept, added = [], []
    for categories in itertools.islice(draw_labels(judged, [rates], seed=1), 300):
        kept.append(sum(feature < 200 for feature in categories["style"]))
        added.append(sum(feature >= 200 for feature in categories["style"]))
        assert categories["tone"] == [0, 1, 2, 3, 4]
        assert categories["style"] == sorted(set(categories["style"]))
    # Binomial with 200 and 0.75, with 800 and 0.1; the mean of 300 draws within four errors.
    assert np.mean(kept) == pytest.approx(150, abs=4 * math.sqrt(200 * 0.75 * 0.25 / 300))
    assert np.mean(added) == pytest.approx(80, abs=4 * math.sqrt(800 * 0.1 * 0.9 / 300))
    assert np.var(kept) == pytest.approx(200 * 0.75 * 0.25, rel=0.35)


def test_counted_rates_are_as_uncertain_as_the_count() -> None:
    judged = labels_of({"style": [True] * 4000})
    rates = ErrorRates("style", 8, 2, 1, 9, exact=False)
    shares = [
        len(categories["style"]) / 4000
        for categories in itertools.islice(draw_labels(judged, [rates]), 800)
    ]
    # Beta(8.5, 2.5): mean 8.5 / 11, variance 8.5 * 2.5 / (121 * 12).
    spread = math.sqrt(8.5 * 2.5 / (121 * 12))
    assert np.mean(shares) == pytest.approx(8.5 / 11, abs=4 * spread / math.sqrt(800))
    assert np.std(shares) == pytest.approx(spread, rel=0.15)


def test_a_perfect_judge_is_left_alone() -> None:
    judged = labels_of({"style": [True, False, True, False]})
    rates = [error_rates_for_mcc("style", 1.0, judged_share=0.5)]
    steered, active = [9, 1, 5, 5], [1, 9, 5, 5]
    [found] = propagate_composition(judged, rates, [counts_of(steered, active)], n_draws=20)
    assert found.figure == "enrichment of style, chosen"
    assert found.measured == pytest.approx((14 / 20) / (6 / 20))
    assert found.propagated == Interval(*[pytest.approx(found.measured)] * 3)
    assert (found.kept, found.reference, found.n_draws) == (1.0, 1.0, 20)
    for strata in (strata_by_use(counts_of(steered, active), 2), [[0, 1]]):
        [again] = propagate_composition(
            judged, rates, [counts_of(steered, active)], n_draws=20, strata=strata
        )
        assert again.propagated == found.propagated


def test_a_judge_that_guesses_leaves_no_conclusion() -> None:
    rng = np.random.default_rng(0)
    n = 2000
    truth = rng.random(n) < 0.2
    active = rng.poisson(20, n)
    steered = rng.poisson(np.where(truth, 8, 2))
    judged = labels_of({"style": truth.tolist()})
    rates = [error_rates_for_mcc("style", 0.0, judged_share=float(truth.mean()), n=400)]
    [found] = propagate_composition(judged, rates, [counts_of(steered, active)], n_draws=300)
    assert found.measured > 2
    assert found.propagated.low < 1 < found.propagated.high
    assert 0.2 < found.kept < 0.8


@pytest.mark.parametrize("tied_to_truth", [False, True])
def test_intervals_cover_the_truth(tied_to_truth: bool) -> None:
    """Many worlds: a judge errs, people check 300 features, and the interval is to hold the truth.

    If use follows the verdict, so that truth says nothing more about it, plain redrawing covers. If
    use follows the truth, it takes strata of use, and plain redrawing must fail, or the test would
    say nothing.
    """
    n, worlds = 1000, 60
    covered = {"plain": 0, "strata": 0}
    for world in range(worlds):
        rng = np.random.default_rng(world)
        truth = rng.random(n) < 0.25
        verdict = np.where(truth, rng.random(n) < 0.75, rng.random(n) < 0.12)
        follows = truth if tied_to_truth else verdict
        steered = rng.random(n) < np.where(follows, 0.6, 0.15)
        counts = counts_of((steered * 10).tolist(), [10] * n)
        checked = rng.choice(n, 300, replace=False)
        a, b = verdict[checked], truth[checked]
        table = [int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())]
        rates = ErrorRates("style", *table, int((~a & ~b).sum()), exact=False)
        true = composition_of(counts, {"style": np.flatnonzero(truth).tolist()})["style"]
        judged = labels_of({"style": verdict.tolist()})
        tried = {"plain": None, "strata": strata_by_use(counts, 1)}
        for name, strata in tried.items() if tied_to_truth else [("plain", None)]:
            [found] = propagate_composition(
                judged, [rates], [counts], strata=strata, n_draws=100, seed=world
            )
            interval = found.propagated
            covered[name] += interval.low <= true.enrichment <= interval.high
    # 95 % nominal: of 60, fewer than 52 happen once in ten thousand.
    right, wrong = ("strata", "plain") if tied_to_truth else ("plain", "strata")
    assert covered[right] >= 52
    if tied_to_truth:
        assert covered[wrong] <= 10


def test_plain_redrawing_errs_towards_no_difference() -> None:
    rng = np.random.default_rng(3)
    n = 3000
    truth = rng.random(n) < 0.25
    verdict = np.where(truth, rng.random(n) < 0.7, rng.random(n) < 0.1)
    counts = counts_of((10 * (rng.random(n) < np.where(truth, 0.6, 0.1))).tolist(), [10] * n)
    rates = ErrorRates(
        "style",
        int((truth & verdict).sum()),
        int((~truth & verdict).sum()),
        int((truth & ~verdict).sum()),
        int((~truth & ~verdict).sum()),
        exact=True,
    )
    judged = labels_of({"style": verdict.tolist()})
    true = composition_of(counts, {"style": np.flatnonzero(truth).tolist()})["style"].enrichment
    [plain] = propagate_composition(judged, [rates], [counts], n_draws=100)
    [fair] = propagate_composition(
        judged, [rates], [counts], strata=strata_by_use(counts, 1), n_draws=100
    )
    assert 1 < plain.propagated.value < plain.measured < true
    assert fair.propagated.value == pytest.approx(true, rel=0.1)


def test_draws_in_strata_by_hand() -> None:
    """Sensitivity 0.8, false alarms 0.1: a stratum in which 45 % are judged so has 50 %."""
    n = 4000
    rates = ErrorRates("c", both=0.16, only_judged=0.08, only_true=0.04, neither=0.72, exact=True)
    verdict = [i % 20 < 9 for i in range(n)]
    silent = [False] * n
    judged = labels_of({"c": verdict + silent})
    kept, added, elsewhere = [], [], []
    draws = draw_labels(judged, [rates], strata=[range(n), range(n, 2 * n)])
    for categories in itertools.islice(draws, 60):
        said = [verdict[feature] for feature in categories["c"] if feature < n]
        kept.append(sum(said) / (0.45 * n))
        added.append((len(said) - sum(said)) / (0.55 * n))
        elsewhere.append(len(categories["c"]) - len(said))
    assert np.mean(kept) == pytest.approx(0.5 * 0.8 / 0.45, abs=0.01)
    assert np.mean(added) == pytest.approx(0.5 * 0.2 / 0.55, abs=0.01)
    # Where the judge never says so, not even by mistake, there is nothing.
    assert set(elsewhere) == {0}


def test_strata_of_use() -> None:
    counts = counts_of([0, 7, 0, 3, 9, 1, 5], [1] * 7)
    assert strata_by_use(counts, 2) == [[0, 2], [3, 5], [1, 4, 6]]
    assert strata_by_use(counts, 1) == [[0, 2], [1, 3, 4, 5, 6]]
    assert strata_by_use(counts, 99) == [[0, 2], [5], [3], [6], [1], [4]]
    assert strata_by_use(counts_of([0, 0], [1, 1])) == [[0, 1]]
    with pytest.raises(ValueError, match="at least one group"):
        strata_by_use(counts, 0)


def test_figures_of_two_categories() -> None:
    judged = labels_of({"style": [True, True, False, False], "tone": [False, False, True, False]})
    rates = [error_rates_for_mcc(name, 1.0, judged_share=0.5) for name in ("style", "tone")]
    segments = [counts_of([4, 4, 1, 1], [1, 1, 1, 1]), counts_of([1] * 4, [1] * 4, "prompt")]
    found = propagate_composition(judged, rates, segments, n_draws=3)
    values = {f.figure: (f.measured, f.reference) for f in found}
    assert values == {
        "enrichment of style, chosen": (pytest.approx(1.6), 1.0),
        "enrichment of tone, chosen": (pytest.approx(0.4), 1.0),
        "enrichment of style less that of tone, chosen": (pytest.approx(1.2), 0.0),
        "enrichment of style, prompt": (pytest.approx(1.0), 1.0),
        "enrichment of tone, prompt": (pytest.approx(1.0), 1.0),
        "enrichment of style less that of tone, prompt": (pytest.approx(0.0), 0.0),
    }


def test_ablations_are_redrawn() -> None:
    """Each feature is worth a known rise, so the expected rise of a redrawn set is known too."""
    worth = np.array([1.0] * 50 + [0.1] * 450)
    judged = labels_of(
        {"style": [i < 50 for i in range(500)], "tone": [i >= 480 for i in range(500)]}
    )
    rates = [ErrorRates("style", 0.06, 0.04, 0.09, 0.81, exact=True)]
    asked: list[Sequence[int]] = []

    def rise(features: Sequence[int]) -> float:
        asked.append(features)
        return float(worth[list(features)].sum())

    found = {
        f.figure: f for f in propagate_ablation(judged, rates, rise, n_draws=200, level=0.8, seed=2)
    }
    style = found["rise of the loss without style"]
    assert style.measured == pytest.approx(50)
    # Six in ten of those judged so stay, one in ten of the others comes in.
    assert style.propagated.value == pytest.approx(0.6 * 50 + 0.1 * 45, abs=1.0)
    assert style.propagated.level == 0.8
    # Variance 50 * 0.24 + 450 * 0.09 * 0.01; 80 % lie within 1.28 standard deviations.
    width = style.propagated.high - style.propagated.low
    assert width == pytest.approx(2 * 1.2816 * math.sqrt(12 + 0.405), rel=0.25)
    assert style.kept == 1.0
    tone = found["rise of the loss without tone"]
    assert (tone.measured, tone.propagated.low) == (pytest.approx(2.0), pytest.approx(2.0))
    less = found["rise without style less rise without tone"]
    assert less.measured == pytest.approx(48)
    assert (less.reference, less.kept) == (0.0, 1.0)
    assert len(asked) == 2 * 201


@pytest.mark.parametrize("sign", [1, -1])
def test_kept_counts_draws_on_the_same_side(sign: int) -> None:
    values = iter([5.0, 6.0, -1.0, -2.0, 2.0, 3.0])
    [found] = propagate(
        labels_of({"c": [True, False]}),
        [error_rates_for_mcc("c", 0.5, judged_share=0.5)],
        lambda categories: {"x": sign * next(values)},
        reference=0.0,
        n_draws=5,
    )
    assert (found.measured, found.kept, found.n_draws) == (sign * 5.0, 0.6, 5)
    assert found.propagated.value == pytest.approx(sign * 8 / 5)


def test_the_same_seed_draws_the_same() -> None:
    judged = labels_of({"c": [i % 3 == 0 for i in range(60)]})
    rates = [error_rates_for_mcc("c", 0.5, judged_share=1 / 3, n=50)]
    counts = [counts_of(range(60), [5] * 60)]
    first, same, other = (
        propagate_composition(judged, rates, counts, n_draws=20, seed=seed) for seed in (0, 0, 1)
    )
    assert first == same != other


def test_features_without_a_label_stay_out() -> None:
    judged = labels_of({"c": [False] * 10}, features=range(5, 15))
    rates = [ErrorRates("c", 0.5, 0.0, 0.4, 0.1, exact=True)]
    for strata in (None, [range(8)], [[]]):
        for categories in itertools.islice(draw_labels(judged, rates, strata=strata), 20):
            assert set(categories["c"]) <= set(range(5, 15))


def test_propagation_errors() -> None:
    judged = labels_of({"c": [True, False]})
    rates = [error_rates_for_mcc("c", 0.5, judged_share=0.5)]
    with pytest.raises(ValueError, match=r"among \['c'\], got \['d'\]"):
        propagate_composition(
            judged, [error_rates_for_mcc("d", 0.5, judged_share=0.5)], [counts_of([1, 1], [1, 1])]
        )
    with pytest.raises(ValueError, match=r"got \[\]"):
        propagate(judged, [], lambda c: {}, reference=0.0)
    with pytest.raises(ValueError, match="at least one draw, got 0"):
        propagate(judged, rates, lambda c: {}, reference=0.0, n_draws=0)


def test_records_survive_json() -> None:
    [found] = propagate_composition(
        labels_of({"c": [True, False]}),
        [error_rates_for_mcc("c", 0.5, judged_share=0.5)],
        [counts_of([1, 2], [2, 1])],
        n_draws=5,
    )
    assert type(found).from_json(found.to_json()) == found
    rates = error_rates_for_mcc("c", 0.5, judged_share=0.5, n=7)
    assert ErrorRates.from_json(rates.to_json()) == rates
    interval = Interval(0.1, 0.0, 0.2)
    agreement = Agreement("c", "a", "b", 1, 2, 3, 4, interval, interval)
    assert Agreement.from_json(agreement.to_json()) == agreement
