"""Gini coefficient, top features and the distribution of |v| against sums over pairs and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import helpers
from peft_fsrl.analysis import (
    FeatureUse,
    Session,
    Usage,
    compute_concentration,
    measure_magnitudes,
    render_concentration,
    render_magnitudes,
)
from peft_fsrl.analysis.concentration import QUANTILES, gini
from peft_fsrl.steering import observe

CATEGORIES = {"style": [4, 2, 7, 12], "honesty": [4, 9, 15]}


def naive_gini(values: Sequence[float]) -> float:
    differences = [abs(a - b) for a in values for b in values]
    return sum(differences) / len(differences) / 2 / (sum(values) / len(values))


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [0.0, 0.0, 5.0], [2.0] * 4, [0.1, 7.0]])
def test_gini_is_half_the_mean_difference_over_the_mean(values: list[float]) -> None:
    assert gini(values) == pytest.approx(naive_gini(values))


def test_gini_at_its_ends() -> None:
    assert gini([1.0] * 10) == pytest.approx(0)
    assert gini([1.0, *[0.0] * 9]) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="nothing to share"):
        gini([0.0, 0.0])


def usage_of(masses: dict[int, float]) -> Usage:
    features = tuple(FeatureUse(f, 0.5, 0.0, mass, 0.5, 0.1) for f, mass in masses.items())
    return Usage("chosen", 10, 1.0, sum(masses.values()), features)


def test_the_most_steered_features() -> None:
    masses = {3: 1.0, 9: 5.0, 4: 3.0, 2: 1.0}
    found = compute_concentration(usage_of(masses), 20, CATEGORIES, shares=(0.05, 0.1, 0.15, 1.0))
    assert (found.n_steered, found.d_sae, found.segment) == (4, 20, "chosen")
    assert found.gini == pytest.approx(naive_gini([*masses.values(), *[0.0] * 16]))
    assert found.gini_steered == pytest.approx(naive_gini(list(masses.values())))
    assert [(top.n, top.mass) for top in found.top] == [(1, 0.5), (2, 0.8), (3, 0.9), (20, 1.0)]
    # Feature 9 first, then 4, which is in both categories.
    counts = [{each.category: each.n for each in top.categories} for top in found.top]
    assert counts[0] == {"style": 0, "honesty": 1}
    assert counts[1] == {"style": 1, "honesty": 2}
    assert counts[3] == {"style": 4, "honesty": 3}
    assert found.top[3].categories[0].mass == pytest.approx((3 + 1) / 10)
    ratios = [top.ratio("style", "honesty") for top in found.top]
    assert ratios == pytest.approx([0, 0.5, 0.5, 4 / 3])
    assert found.top[0].ratio("honesty", "style") == math.inf
    text = render_concentration(found)
    assert "over the 4 that are steered" in text
    assert "style : honesty" in text
    assert "inf" not in text
    assert type(found).from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="shares above 0"):
        compute_concentration(usage_of(masses), 20, shares=(0.0,))
    with pytest.raises(ValueError, match="Nothing is steered on the 'chosen'"):
        compute_concentration(usage_of({}), 20)


def steered_values(model: Any, rows: list[dict[str, str]]) -> list[list[float]]:
    """The steering of every feature over the words of the chosen answers, one text at a time."""
    values: list[list[float]] = [[] for _ in range(helpers.D_SAE)]
    for row in rows:
        prompt = [1, *(int(word[1:]) for word in row["prompt"].split())]
        answer = [int(word[1:]) for word in row["chosen"].split()]
        events: list[Any] = []
        with torch.no_grad(), observe(model, events.append):
            model(input_ids=torch.tensor([[*prompt, *answer]]))
        for v in events[0].steering_vector[0, len(prompt) :]:
            for feature, value in enumerate(v.tolist()):
                values[feature].append(value)
    return values


def test_magnitudes_by_category_equal_a_sort() -> None:
    model, rows = helpers.fsrl_model(), helpers.tiny_preferences(8).to_list()
    session = Session(model, helpers.tiny_tokenizer(), rows, batch_size=3)
    found = measure_magnitudes(session, CATEGORIES)
    values = steered_values(model, rows)
    others = set(range(helpers.D_SAE)) - {f for features in CATEGORIES.values() for f in features}
    members = {**CATEGORIES, "other": sorted(others)}
    assert [each.category for each in found] == list(members)
    for each in found:
        mine = [x for feature in members[each.category] for x in values[feature] if x]
        sizes = sorted(map(abs, mine))
        assert each.n == len(sizes) > 20
        assert each.promoted == pytest.approx(sum(x > 0 for x in mine) / len(mine))
        assert each.mean == pytest.approx(sum(sizes) / len(sizes), rel=1e-5)
        for quantile, value in zip(QUANTILES, each.quantiles, strict=True):
            exact = sizes[math.ceil(quantile * len(sizes)) - 1]
            assert value == pytest.approx(exact, rel=0.02)
    assert render_magnitudes(found).count("\n") == 3


def test_magnitudes_of_what_is_never_steered() -> None:
    model = helpers.fsrl_model(features=[1, 2])
    session = Session(model, helpers.tiny_tokenizer(), helpers.tiny_preferences(3))
    [style, other] = measure_magnitudes(session, {"style": [9]})
    assert (style.n, style.mean, style.quantiles) == (0, 0.0, ())
    assert other.n > 0
    assert "nan" in render_magnitudes([style, other])
    with pytest.raises(ValueError, match="'other' is kept"):
        measure_magnitudes(session, {"other": [1]})
