"""What requests may ask, what they are told when they may not, and what a cache must tell apart."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from peft_fsrl.serving.requests import Served, SteeringRequest, parse_request

SERVED = Served(
    {"one": "a", "two": "b"},
    {"one": 10, "two": 6},
    {"one": ["layers.1"], "two": ["layers.2"]},
    "labels.csv",
    {"style": [3, 1], "honesty": [7]},
    ["one"],
)


def test_who_asks_for_nothing_is_steered_by_the_first_adapter() -> None:
    assert parse_request(None, SERVED) == SteeringRequest("one")
    assert parse_request({"other": 1}, SERVED) == SteeringRequest("one", 1.0, (), "all", 0)


def test_everything_can_be_asked_for() -> None:
    asked = {
        "fsrl_adapter": "two",
        "fsrl_strength": -2,
        "fsrl_ablate": [5, "0"],
        "fsrl_phase": "generation",
        "fsrl_features": 3.0,
    }
    expected = SteeringRequest("two", -2.0, (0, 5), "generation", 3)
    assert parse_request(asked, SERVED) == expected


@pytest.mark.parametrize(
    ("given", "features"),
    [("style", (1, 3)), ("7,style", (1, 3, 7)), ([], ()), (4, (4,)), (["style", 2], (1, 2, 3))],
)
def test_categories_and_indices_are_ablated(given: Any, features: tuple[int, ...]) -> None:
    assert parse_request({"fsrl_ablate": given}, SERVED).ablated == features


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("strength", "1", "finite number"),
        ("strength", float("nan"), "finite number"),
        ("strength", float("inf"), "finite number"),
        ("strength", True, "finite number"),
        ("strength", None, "finite number"),
        ("ablate", 10, "features 0 to 9"),
        ("ablate", [-1], "features 0 to 9"),
        ("ablate", 1.5, "feature indices"),
        ("ablate", "tone", r"category among \['honesty', 'style'\]"),
        ("ablate", [None], "feature indices"),
        ("ablate", float("inf"), "feature indices"),
        ("adapter", "three", r"expected one of \['one', 'two'\]"),
        ("adapter", ["one"], "not loaded"),
        ("phase", "decode", "must be one of"),
        ("features", 21, "from 0 to 20"),
        ("features", 1.5, "from 0 to 20"),
        ("features", float("nan"), "from 0 to 20"),
        ("strengh", 1, "expected one of fsrl_adapter, fsrl_strength"),
    ],
)
def test_what_means_nothing_is_refused(key: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_request({f"fsrl_{key}": value}, SERVED)


def test_categories_of_another_sae_mean_nothing() -> None:
    with pytest.raises(ValueError, match=r"expects feature indices, got 'style'"):
        parse_request({"fsrl_adapter": "two", "fsrl_ablate": "style"}, SERVED)


def test_a_cache_tells_apart_what_is_steered_differently() -> None:
    different = [
        SteeringRequest("one"),
        SteeringRequest("two"),
        SteeringRequest("one", 0.5),
        SteeringRequest("one", 0.0),
        SteeringRequest("one", ablated=(1,)),
        SteeringRequest("one", ablated=(1, 2)),
        SteeringRequest("one", phase="prompt"),
        SteeringRequest("one", phase="generation"),
    ]
    salts = [request.cache_salt("one", "own") for request in different]
    assert all(left != right for left, right in combinations(salts, 2))
    # What does not change what is computed shares: seeing features, and all ways to the base.
    assert SteeringRequest("one", features=3).cache_salt("one", None) is None
    assert SteeringRequest("one").cache_salt("one", "own") == "own"
    base = {SteeringRequest(name, 0.0).cache_salt("one", None) for name in ("one", "two")}
    assert len(base) == 1
    assert SteeringRequest("one", 0.5).cache_salt("one", "a") != SteeringRequest(
        "one", 0.5
    ).cache_salt("one", "b")
