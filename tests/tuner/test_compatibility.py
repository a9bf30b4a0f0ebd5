"""Two configs are compared in what decides the meaning of an adapter's numbers, and only there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peft_fsrl import FSRLConfig
from peft_fsrl.tuner.compatibility import require_same_adapter


def info(fingerprint: str = "a" * 64, hook: str = "blocks.1.hook_resid_post") -> dict[str, Any]:
    return {"": {"fingerprint": fingerprint, "hook_name": hook, "d_sae": 8}}


def config(**options: Any) -> FSRLConfig:
    return FSRLConfig(**{"layer": 1, "sae": "release/id", "sae_info": info(), **options})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sae_info": info("b" * 64)}, "sae fingerprint"),
        ({"features": [0, 1]}, r"features=None, .* found features=\[0, 1\]"),
        ({"exclude_features": [3]}, "exclude_features"),
        ({"rank": 2}, "rank=2"),
        ({"activation": "relu"}, "activation"),
        ({"non_negative": False}, "non_negative"),
        ({"layer": 2}, r"layer=\[1\].* layer=\[2\]"),
        ({"layer": None, "target_modules": ["model.layers.1"]}, "layer"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_decides_the_meaning_is_compared(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"The weights in out/1 .*{named}"):
        require_same_adapter(config(), config(**options), "out/1")


@pytest.mark.parametrize(
    "options",
    [
        {"l1_coeff": 3.0, "target_l0": 5.0, "init_scale": 0.1, "threshold_lr_multiplier": 2.0},
        {"sae": "elsewhere", "sae_dtype": "bfloat16"},
        {"layer": [1]},
        {"layer": None},
        {"sae": {"1": "release/id"}, "sae_info": {"1": info()[""]}},
    ],
)
def test_what_a_run_may_change_is_not(options: dict[str, Any]) -> None:
    require_same_adapter(config(), config(**options), "out/1")


def test_layers_have_saes_of_their_own() -> None:
    two = {"1": info()[""], "2": info("b" * 64)[""]}
    expected = config(layer=[1, 2], sae={"1": "r/1", "2": "r/2"}, sae_info=two)
    require_same_adapter(expected, replace(expected, layer=[2, 1]), "out/1")
    other = replace(expected, sae_info={"1": two["2"], "2": two["1"]})
    with pytest.raises(ValueError, match="sae fingerprint"):
        require_same_adapter(expected, other, "out/1")
