"""``FSRLConfig``: what it accepts, what it refuses, and its way through JSON."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, get_peft_model

from helpers import fsrl_model, only_layer, tiny_model, tiny_sae
from peft_fsrl import FSRLConfig
from peft_fsrl.steering import adapter_configs

RELEASED = "gemma-scope-2b-pt-res/layer_12/width_65k/average_l0_72"


def test_defaults_are_the_method_of_the_paper() -> None:
    config = FSRLConfig(layer=12, sae=RELEASED)
    assert config.activation == "soft_threshold"
    assert config.penalty_reduction == "sequence"
    assert config.non_negative
    assert (config.l1_coeff, config.l0_coeff) == (0.1, 0.0)
    assert config.peft_type == "FSRL"


def test_a_target_needs_no_penalty() -> None:
    assert FSRLConfig(layer=12, sae=RELEASED, target_l0=8.0).l1_coeff == 0.0
    assert FSRLConfig(layer=12, sae=RELEASED, target_l0=8.0, l1_coeff=0.3).l1_coeff == 0.3


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layer": "1"}, "`layer` must be an integer or a list of integers, got '1'"),
        ({"layer": "abc"}, "`layer` must be an integer or a list of integers, got 'abc'"),
        ({"layer": 1.5}, r"`layer` must be an integer or a list of integers, got 1\.5"),
        ({"layer": 1.0}, r"`layer` must be an integer or a list of integers, got 1\.0"),
        ({"layer": float("nan")}, "`layer` must be an integer or a list of integers, got nan"),
        ({"layer": [1, "2"]}, r"`layer` must be an integer or a list of integers, got \[1, .2.\]"),
        ({"layer": True}, "`layer` must be an integer or a list of integers, got True"),
        ({"l1_coeff": "0.1"}, "`l1_coeff` must be a number, got '0.1'"),
        ({"l1_coeff": True}, "`l1_coeff` must be a number, got True"),
        ({"non_negative": 1}, "`non_negative` must be True or False, got 1"),
        ({"non_negative": "false"}, "`non_negative` must be True or False, got 'false'"),
        ({"jumprelu_bandwidth": None}, "`jumprelu_bandwidth` must be a number, got None"),
        ({"activation": "gain", "min_gain": "-1"}, "`min_gain` must be a number, got '-1'"),
        ({"activation": "gain", "min_gain": True}, "`min_gain` must be a number, got True"),
        ({"sae": 3}, r"`sae` must be 'release/sae_id'.*got int"),
        ({"sae": ("a", "b", "c")}, r"pair must be \(release, sae_id\)"),
        ({"sae": ("a", 1)}, r"pair must be \(release, sae_id\)"),
    ],
)
def test_wrong_kinds(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        FSRLConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layer": -1}, "`layer` must be 0 or more, got -1"),
        ({"layer": 1, "target_modules": ["x"]}, "give one of them.*layer=1"),
        ({"activation": "gelu"}, "`activation` must be one of .*'soft_threshold'.*got 'gelu'"),
        ({"init_weights": True}, "`init_weights` must be one of .*'encoder'.*got True"),
        (
            {"init_weights": "encoder", "activation": "relu", "rank": 4},
            "cannot start a weight of rank=4. Leave `rank` out",
        ),
        (
            {"init_weights": "encoder"},
            "init_weights='encoder' needs activation='relu' or 'jumprelu', got 'soft_threshold'",
        ),
        ({"activation": "gain", "rank": 4}, "rank=4. Leave `rank` out, or.*other than 'gain'"),
        ({"activation": "gain", "init_scale": 0.5}, "`init_scale` would do nothing; got 0.5"),
        ({"activation": "gain", "init_threshold": 0}, "`init_threshold` would do nothing; got 0"),
        ({"activation": "gain", "l0_coeff": 0.1}, "`l0_coeff` needs activation='jumprelu'"),
        ({"min_gain": -0.5}, "`min_gain` needs activation='gain', got 'soft_threshold'. Leave it"),
        ({"activation": "gain", "min_gain": 0.1}, "`min_gain` must be .*at most 0, .*; got 0.1"),
        ({"activation": "gain", "min_gain": float("nan")}, "`min_gain` must be finite"),
        ({"activation": "gain", "min_gain": float("-inf")}, "`min_gain` must be finite"),
        ({"penalty_reduction": "batch"}, "`penalty_reduction` must be one of .*got 'batch'"),
        ({"init_scale": 0.0}, "`init_scale` must be finite and positive, got 0"),
        ({"jumprelu_bandwidth": -1.0}, "`jumprelu_bandwidth` must be finite and positive"),
        ({"threshold_lr_multiplier": float("inf")}, "`threshold_lr_multiplier` must be finite"),
        ({"l1_coeff": -0.1}, "`l1_coeff` must be finite and not negative"),
        ({"l1_coeff": float("nan")}, "`l1_coeff` must be finite"),
        ({"l0_coeff": -1.0, "activation": "jumprelu"}, "`l0_coeff` must be finite and not neg"),
        ({"init_threshold": -1.0}, "`init_threshold` must be finite and not negative"),
        ({"init_threshold": 0.0, "activation": "jumprelu"}, "`init_threshold` must be .*positive"),
        ({"l0_coeff": 0.1}, "`l0_coeff` needs activation='jumprelu'.*Use `l1_coeff`"),
    ],
)
def test_wrong_values(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FSRLConfig(**settings)


@pytest.mark.parametrize(
    ("sae", "stored"),
    [
        (RELEASED, RELEASED),
        (("release", "id"), {"release": "release", "sae_id": "id"}),
        (["release", "id"], {"release": "release", "sae_id": "id"}),
        ({"release": "r", "sae_id": "i"}, {"release": "r", "sae_id": "i"}),
        ({"path": Path("/somewhere")}, {"path": "/somewhere"}),
        (Path("/somewhere"), "/somewhere"),
    ],
)
def test_references_are_stored_as_plain_json(sae: Any, stored: Any) -> None:
    config = FSRLConfig(layer=1, sae=sae)
    assert config.sae == config.resolve_saes()[""] == stored
    assert json.loads(json.dumps(config.to_dict()))["sae"] == stored


def test_a_folder_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_sae").mkdir()
    monkeypatch.chdir(tmp_path)
    for reference in ("my_sae", Path("my_sae"), "./my_sae/"):
        assert FSRLConfig(layer=1, sae=reference).sae == str(tmp_path / "my_sae")


def test_a_live_sae_stays_out_of_the_fields() -> None:
    sae = tiny_sae()
    config = FSRLConfig(layer=1, sae=sae)
    assert config.sae == "<live>"
    assert config.resolve_saes()[""] is sae
    assert json.loads(json.dumps(config.to_dict()))["sae"] == "<live>"
    for other in (copy.copy(config), copy.deepcopy(config), replace(config, rank=2)):
        assert other.resolve_saes()[""] is sae


def test_what_is_set_later_is_brought_into_plain_form_by_the_model(tmp_path: Path) -> None:
    config = FSRLConfig(layer=1, sae="nowhere")
    config.sae, config.features = tiny_sae(), torch.tensor([3, 1])
    config.rank = np.int64(2)
    model = get_peft_model(tiny_model(), config)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["sae"], saved["features"], saved["rank"]) == (
        {"beside_adapter": "sae"},
        [1, 3],
        2,
    )
    tiny_sae().save_model(tmp_path / "folder")
    config.sae = tmp_path / "folder"
    config.save_pretrained(str(tmp_path / "second"))
    saved = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert saved["sae"] == str(tmp_path / "folder")
    config.activation = "tanh"
    with pytest.raises(ValueError, match="`activation` must be one of"):
        get_peft_model(tiny_model(), config)


def test_a_mask_is_no_list_of_features() -> None:
    for mask in (torch.tensor([True, False]), np.array([True, False]), [True, False]):
        with pytest.raises(TypeError, match="got a mask of truth values"):
            FSRLConfig(layer=1, features=mask)


def test_one_config_serves_several_models(tmp_path: Path) -> None:
    config = FSRLConfig(sae=tiny_sae())
    before = config.to_dict()
    first = get_peft_model(tiny_model(), config)
    # PEFT keeps the user's object, in which nothing is written.
    assert first.peft_config["default"] is config
    assert adapter_configs(first)["default"].layer == 1
    config.sae = tiny_sae(seed=1)
    second = get_peft_model(tiny_model("gpt2"), config)
    assert only_layer(first).layer_name == "model.layers.1"
    assert only_layer(second).layer_name == "transformer.h.1"
    infos = [adapter_configs(model)["default"].sae_info[""] for model in (first, second)]
    assert infos[0]["fingerprint"] != infos[1]["fingerprint"]
    first.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["sae_info"] == {"": infos[0]}
    assert FSRLConfig.from_pretrained(tmp_path).layer == 1
    config.sae = before["sae"]
    changed = {k for k, v in config.to_dict().items() if v != before[k]}
    # PEFT itself notes there which task and model a config was used for.
    assert changed <= {"base_model_name_or_path", "task_type", "auto_mapping", "peft_version"}


def test_no_sae() -> None:
    with pytest.raises(ValueError, match="needs `sae`"):
        FSRLConfig(layer=1).resolve_saes()[""]


def test_a_live_sae_does_not_survive_json() -> None:
    config = FSRLConfig(**json.loads(json.dumps(FSRLConfig(layer=1, sae=tiny_sae()).to_dict())))
    with pytest.raises(ValueError, match=r"live SAE that no longer exists\. Pass the SAE again"):
        config.resolve_saes()[""]


EVERY_FIELD = {
    "layer": 3,
    "sae": ("release", "id"),
    "features": [1, 2],
    "rank": 4,
    "activation": "jumprelu",
    "non_negative": False,
    "init_weights": "uniform",
    "init_scale": 0.5,
    "init_threshold": 0.25,
    "jumprelu_bandwidth": 0.125,
    "l1_coeff": 0.75,
    "l0_coeff": 0.5,
    "penalty_reduction": "token",
    "threshold_lr_multiplier": 2.0,
    "sae_dtype": "bfloat16",
    "modules_to_save": ["lm_head"],
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
}


def test_round_trip_through_json_and_disk(tmp_path: Path) -> None:
    config = FSRLConfig(**EVERY_FIELD)
    assert FSRLConfig(**json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(str(tmp_path))
    assert FSRLConfig.from_pretrained(str(tmp_path)) == config
    found = PeftConfig.from_pretrained(str(tmp_path))
    assert type(found) is FSRLConfig
    assert found == config


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_sets_become_sorted_lists(field: str) -> None:
    config = FSRLConfig(**{"target_modules": ["a"], field: {"b", "a"}})
    assert getattr(config, field) == ["a", "b"]


def test_saved_beside_the_adapter(tmp_path: Path) -> None:
    model = fsrl_model()
    model.save_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"].sae == "<live>"
    config = FSRLConfig.from_pretrained(str(tmp_path / "adapter"))
    assert config.sae == "<live>"
    assert config.resolve_saes()[""] == {"path": str(tmp_path / "adapter" / "sae")}
    nested = FSRLConfig.from_pretrained(str(tmp_path), subfolder="adapter")
    assert nested.resolve_saes()[""] == config.resolve_saes()[""]


def test_moved_folder_is_found(tmp_path: Path) -> None:
    fsrl_model().save_pretrained(tmp_path / "before")
    os.rename(tmp_path / "before", tmp_path / "after")
    config = FSRLConfig.from_pretrained(str(tmp_path / "after"))
    assert config.resolve_saes()[""] == {"path": str(tmp_path / "after" / "sae")}


def test_reading_without_the_folder_says_what_to_do(tmp_path: Path) -> None:
    fsrl_model().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    fields.pop("peft_version", None)
    with pytest.raises(ValueError, match=r"does not know which folder.*from_pretrained"):
        FSRLConfig(**{k: v for k, v in fields.items() if k != "peft_type"}).resolve_saes()[""]


def test_one_config_for_two_models() -> None:
    config = FSRLConfig(layer=1, sae=tiny_sae())
    first, second = get_peft_model(tiny_model(), config), get_peft_model(tiny_model("gpt2"), config)
    names = [[n for n, _ in model.named_parameters() if "fsrl" in n] for model in (first, second)]
    assert [len(found) for found in names] == [3, 3]
    assert "model.layers.1." in names[0][0]
    assert "transformer.h.1." in names[1][0]


@pytest.mark.parametrize("layer", [np.int64(1), [np.int64(1)], (1,)])
def test_integers_of_numpy_are_saved_as_json(layer: Any, tmp_path: Path) -> None:
    config = FSRLConfig(layer=layer, sae="release/sae_id", rank=np.int32(2))
    config.save_pretrained(str(tmp_path))
    again = FSRLConfig.from_pretrained(str(tmp_path))
    assert (again.layers, again.rank) == ([1], 2)


@pytest.mark.parametrize("name", ["features", "exclude_features"])
def test_features_of_layers_that_have_no_sae_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` by layer.*among \[\], got \['1'\]"):
        FSRLConfig(layer=1, sae="release/sae_id", **{name: {1: [2]}})
    saes = {0: "release/zero", 1: "release/one"}
    with pytest.raises(ValueError, match=rf"`{name}` by layer.*\['0', '1'\], got \['0', '7'\]"):
        FSRLConfig(sae=saes, **{name: {0: [1], 7: [2]}})
    # A layer that is left out keeps all of its features.
    assert FSRLConfig(sae=saes, features={0: [1]}).select_features("1", 9) is None


def test_features_that_are_no_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="interpreted as an integer"):
        FSRLConfig(layer=1, sae="release/sae_id", features=[1.7])
