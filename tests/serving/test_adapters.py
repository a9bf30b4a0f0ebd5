"""Adapters as a server loads them: PEFT's checks, without the base model's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import nn
from transformers import AutoConfig

from helpers import naive_steer, only_layer, tiny_model, tiny_sae
from peft_fsrl.serving.adapters import (
    Place,
    describe,
    load_adapters,
    parse_sources,
    update_layer,
)
from serving_helpers import D_SAE, WIDTH, load_reference, save_adapter, save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("saved")
    model = save_model(folder / "model")
    return model, save_adapter(folder / "adapter", model)


def load(adapter: Path, model: Path) -> dict[Place, nn.Module]:
    config = AutoConfig.from_pretrained(model)
    return load_adapters({"default": str(adapter)}, config, torch.float32)["default"]


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("folder", {"default": "folder"}),
        ("a=x, b=user/y", {"a": "x", "b": "user/y"}),
        ("x,b=y", {"default": "x", "b": "y"}),
    ],
)
def test_sources_by_name(text: str, sources: dict[str, str]) -> None:
    assert parse_sources(text) == sources


@pytest.mark.parametrize("text", ["a=x,a=y", "=x", "a=", "x,y"])
def test_sources_without_a_name_of_their_own(text: str) -> None:
    with pytest.raises(ValueError, match="PEFT_FSRL_ADAPTER"):
        parse_sources(text)


def test_a_served_layer_steers_by_the_formula(saved: tuple[Path, Path]) -> None:
    model, adapter = saved
    [(place, layer)] = load(adapter, model).items()
    assert (place.layer, place.inside, place.name) == (1, "", "layers.1")
    own = layer.fsrl_adapter["default"]
    # As `save_adapter` makes it, and as nothing in the folder could be mistaken for.
    sae = tiny_sae("jumprelu", d_in=WIDTH, d_sae=D_SAE)
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        expected, _, _ = naive_steer(sae, x, own.weight, own.bias, own.threshold)
        torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(expected, x)


def test_other_weights_take_the_place_of_the_served_ones(saved: tuple[Path, Path]) -> None:
    model, adapter = saved
    [layer] = load(adapter, model).values()
    trained = load_reference(model, adapter)
    own = only_layer(trained).fsrl_adapter["default"]
    with torch.no_grad():
        own.weight.add_(1.0)
    state = get_peft_model_state_dict(trained)
    update_layer(layer, state)
    assert torch.equal(layer.fsrl_adapter["default"].weight, own.weight)
    foreign = {k: v + 1 if k.endswith("identity") else v for k, v in state.items()}
    for wrong in (foreign, {}):
        with pytest.raises(ValueError, match=r"weights of the features that are served"):
            update_layer(layer, wrong)


def test_gains_take_the_place_of_the_served_ones(saved: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = saved
    adapter = save_adapter(tmp_path / "gains", model, activation="gain")
    [layer] = load(adapter, model).values()
    trained = load_reference(model, adapter)
    with torch.no_grad():
        only_layer(trained).fsrl_adapter["default"].gain.mul_(-2.0)
    update_layer(layer, get_peft_model_state_dict(trained))
    own, x = layer.fsrl_adapter["default"], torch.randn(5, WIDTH)
    sae = tiny_sae("jumprelu", d_in=WIDTH, d_sae=D_SAE)
    with torch.no_grad():
        gain = only_layer(trained).fsrl_adapter["default"].gain
        expected, _, _ = naive_steer(sae, x, own.weight, own.bias, gain, "gain")
        torch.testing.assert_close(layer(x), expected)


def test_places_have_the_path_of_the_servers_model(saved: tuple[Path, Path]) -> None:
    wrapped = nn.ModuleDict({"language_model": tiny_model()})
    assert Place(2, "mlp", False).path_in(wrapped) == "language_model.model.layers.2.mlp"
    with pytest.raises(ValueError, match=r"Expected a module .*layers\.2\.ffn"):
        Place(2, "ffn", False).path_in(wrapped)


def test_what_is_served_is_said_in_plain_values(saved: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = saved
    labels = tmp_path / "labels.csv"
    labels.write_text("feature,category\n3,style\n1,style\n")
    other = save_adapter(tmp_path / "other", model, seed=1)
    adapters = {
        "one": load(adapter, model),
        "two": load(other, model),
        "again": load(adapter, model),
    }
    served = describe({name: name for name in adapters}, adapters, str(labels))
    plain = json.loads(json.dumps(served.to_dict()))
    assert plain["n_features"] == dict.fromkeys(adapters, D_SAE)
    assert plain["places"]["one"] == ["layers.1"]
    assert plain["categories"] == {"style": [1, 3]}
    assert plain["labeled"] == ["one", "again"]


def test_what_cannot_be_served_is_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = saved
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load(tmp_path / "gone", model)

    narrow = save_model(tmp_path / "narrow" / "model", hidden_size=32)
    with pytest.raises(ValueError, match="reads activations of width 64"):
        load(adapter, narrow)

    shallow = save_model(tmp_path / "shallow" / "model", num_hidden_layers=1)
    with pytest.raises(ValueError, match="Layer 1 does not exist"):
        load(adapter, shallow)

    without = shutil.copytree(adapter, tmp_path / "without")
    shutil.rmtree(without / "sae")
    with pytest.raises(FileNotFoundError, match="SAE in SAELens's format"):
        load(without, model)

    other = shutil.copytree(adapter, tmp_path / "other")
    tiny_sae("jumprelu", d_in=WIDTH, d_sae=D_SAE, seed=5).save_model(other / "sae")
    with pytest.raises(ValueError, match="The SAE has changed"):
        load(other, model)

    whole = save_adapter(tmp_path / "whole", model, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"fully trained modules \(\['lm_head'\]\)"):
        load(whole, model)

    top = save_adapter(tmp_path / "top", model, layer=None, target_modules=["model.norm"])
    with pytest.raises(ValueError, match=r"steers model\.norm, which lies in no decoder layer"):
        load(top, model)


def test_another_base_of_the_same_shape_is_warned_of(
    saved: tuple[Path, Path], tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other")
    with pytest.warns(UserWarning, match=r"was trained on '.*model', and '.*other' is served"):
        load(saved[1], other)
