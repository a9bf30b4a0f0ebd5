"""Saved adapters that were damaged, mixed up or made to do harm."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import (
    D_SAE,
    fsrl_model,
    only_layer,
    randomize_adapter,
    tiny_model,
    tiny_sae,
    token_ids,
)
from peft_fsrl import FSRLConfig, load_sae
from peft_fsrl.files import compute_sha256

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter with its SAE beside it; not to be modified."""
    folder = tmp_path_factory.mktemp("saved")
    fsrl_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def load(folder: Path, **settings: Any) -> PeftModel:
    return PeftModel.from_pretrained(tiny_model(), folder, **settings).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}, indent=2, sort_keys=True))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def key(name: str, layer: int = 1) -> str:
    return f"base_model.model.model.layers.{layer}.fsrl_adapter.{name}"


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): compute_sha256(path) for path in files}


# Damage


def header_length(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


REGIONS: dict[str, Callable[[Path], int]] = {
    "nothing": lambda path: 0,
    "within the header's length": lambda path: 4,
    "within the header": lambda path: 8 + header_length(path) // 2,
    "before the tensors": lambda path: 8 + header_length(path),
    "one byte short": lambda path: path.stat().st_size - 1,
}


@pytest.mark.parametrize("file", [WEIGHTS, "sae/sae_weights.safetensors"])
@pytest.mark.parametrize("region", REGIONS)
def test_truncated_tensors_do_not_load(region: str, file: str, folder: Path) -> None:
    os.truncate(folder / file, REGIONS[region](folder / file))
    with pytest.raises(Exception, match=r"cannot be read|[Hh]eader|[Mm]etadata|deserializ"):
        load(folder)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_truncated_config_does_not_load(size: int, folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text[:size])
    with pytest.raises(json.JSONDecodeError):
        load(folder)


def test_no_byte_of_the_saes_tensors_can_change_unnoticed(folder: Path) -> None:
    path = folder / "sae" / "sae_weights.safetensors"
    original, start = path.read_bytes(), 8 + header_length(path)
    for position in range(start, len(original), 797):
        data = bytearray(original)
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="The SAE has changed since this adapter was saved"):
            load(folder)
    path.write_bytes(original)
    load(folder)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("apply_b_dec_to_input", False), ("normalize_activations", "layer_norm"), ("d_sae", 23)],
)
def test_the_saes_settings_cannot_change_unnoticed(setting: str, value: Any, folder: Path) -> None:
    path = folder / "sae" / "cfg.json"
    cfg = json.loads(path.read_text())
    assert cfg[setting] != value
    path.write_text(json.dumps({**cfg, setting: value}))
    with pytest.raises((ValueError, RuntimeError), match=r"SAE has changed|size mismatch"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_sae_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    sae = tiny_sae()
    with torch.no_grad():
        sae.W_dec[3, 2] = value
    sae.save_model(tmp_path / "sae")
    with pytest.raises(ValueError, match="found nan or inf in W_dec"):
        load_sae(str(tmp_path / "sae"))


# Harm


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("name", ["sae_weights.pt", "sae_weights.pkl", "pytorch_model.bin"])
def test_pickles_in_an_saes_folder_are_not_opened(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "sae" / name).write_bytes(pickle.dumps(Payload()))
    load(folder)
    (folder / "sae" / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        load(folder)
    assert not (folder / "ran").exists()
    pickle.loads((folder / "sae" / name).read_bytes())
    assert (folder / "ran").exists()


@pytest.mark.parametrize("method", ["FSRL", "LORA"])
def test_reading_a_folder_writes_nothing(method: str, folder: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    (private / "sae").mkdir(parents=True)
    for name in (WEIGHTS, CONFIG, "sae/cfg.json", "letter.txt"):
        (private / name).write_text("private")
    if method == "LORA":
        lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
        lora.save_pretrained(folder)
    # What an earlier form of the library moved into place when it found it.
    for name in (".fsrl_saved", ".fsrl_saving_x", ".tmp"):
        (folder / name).symlink_to(private)
    before = contents(folder), contents(private)
    PeftConfig.from_pretrained(str(folder))
    load(folder)
    assert (contents(folder), contents(private)) == before
    assert all((folder / name).is_symlink() for name in (".fsrl_saved", ".fsrl_saving_x", ".tmp"))


FOREIGN = "base_model.model.model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "name", [FOREIGN, "base_model.model.lm_head.weight", "base_model.model.model.norm.weight", "x"]
)
def test_tensors_of_the_base_model_are_refused(name: str, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match=r"only tensors of the adapter .* would replace weights"):
        FSRLConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="would replace weights of the base model"):
        load(folder)


def test_loading_over_an_adapter_refuses_them_as_well(folder: Path) -> None:
    base = tiny_model()
    weight = base.model.layers[2].mlp.down_proj.weight
    before = weight.detach().clone()
    edit_tensors(folder, lambda tensors: tensors.update({FOREIGN: torch.zeros_like(weight)}))
    model = fsrl_model(base)
    with pytest.raises(ValueError, match="would replace weights of the base model"):
        model.load_adapter(folder, "default")
    assert torch.equal(weight, before)


def test_modules_to_save_are_the_adapters_own(tmp_path: Path) -> None:
    model = fsrl_model(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    edit_tensors(tmp_path, lambda tensors: tensors.update({FOREIGN: torch.zeros(16, 32)}))
    with pytest.raises(ValueError, match="would replace weights of the base model"):
        load(tmp_path)


@pytest.mark.parametrize(
    "place", ["../outside", "/etc", "sae/../../outside", "nested/sae", "", "sae_layer_x", "SAE"]
)
def test_an_sae_beside_the_adapter_lies_beside_it(place: str, folder: Path) -> None:
    shutil.copytree(folder / "sae", folder.parent / "outside")
    edit_config(folder, sae={"beside_adapter": place})
    with pytest.raises(ValueError, match="Expected the adapter's SAE in a folder named"):
        load(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path) -> None:
    shutil.move(folder / "sae", folder.parent / "outside")
    (folder / "sae").symlink_to(folder.parent / "outside")
    with pytest.raises(ValueError, match="found a link to"):
        load(folder)


def test_files_inside_may_be_links_as_in_the_hubs_cache(folder: Path, saved: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = folder.parent / f"blob-{path.name}"
        shutil.move(path, blob)
        path.symlink_to(blob)
    assert torch.equal(logits(load(folder)), logits(load(saved)))


def test_nothing_is_allocated_before_shapes_are_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(folder, rank=10**9)

    def injected(*_: Any, **__: Any) -> None:
        raise AssertionError("an adapter was made")

    monkeypatch.setattr("peft_fsrl.tuner.layer.SteeringAdapter.__init__", injected)
    with pytest.raises(ValueError, match=r"weight in .*shape .*1000000000.*found F32 of shape"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_weights_must_be_floating_point(dtype: torch.dtype, folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({key("weight"): t[key("weight")].to(dtype)}))
    with pytest.raises(ValueError, match=r"weight in .* as floating-point numbers.*found [IUB]"):
        load(folder)


# Weights and config that do not belong together


def refused(missing: str, adapter_name: str = "default") -> Any:
    message = rf"do not belong to this adapter .*expected \[.*{adapter_name}\.{missing}'\]"
    return pytest.raises(ValueError, match=message)


@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}])
@pytest.mark.parametrize("missing", ["weight", "threshold", "identity"])
def test_missing_tensors_are_refused(missing: str, settings: dict[str, Any], folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(key(missing)))
    with refused(missing):
        load(folder, **settings)


def test_missing_tensors_are_refused_by_the_auto_class(folder: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    edit_tensors(folder, lambda tensors: tensors.pop(key("bias")))
    edit_config(folder, base_model_name_or_path=str(tmp_path / "base"))
    with refused("bias"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["style", "o", "model"])
def test_an_adapter_whose_name_occurs_in_others_loads(name: str, folder: Path) -> None:
    model = fsrl_model()
    model.add_adapter(f"{name}2", FSRLConfig(layer=1, sae=tiny_sae(seed=2)))
    model.load_adapter(folder, name)
    model.set_adapter(name)
    assert torch.equal(logits(model), logits(load(folder)))
    edit_tensors(folder, lambda tensors: tensors.pop(key("bias")))
    with refused("bias", name):
        model.load_adapter(folder, name)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({}, {"sae": tiny_sae(seed=5)}),
        ({"features": [0, 1, 2]}, {"features": [3, 4, 5]}),
        ({}, {"non_negative": False}),
        ({"exclude_features": [1]}, {"exclude_features": [2]}),
    ],
)
def test_loading_over_an_adapter_of_other_features_is_refused(
    here: dict[str, Any], there: dict[str, Any], tmp_path: Path
) -> None:
    fsrl_model(**there).save_pretrained(tmp_path)
    model = fsrl_model(**here)
    before = logits(model)
    with pytest.raises(ValueError, match="steer other features than adapter 'default'"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), before)
    model.load_adapter(tmp_path, "other")
    fsrl_model(**here).save_pretrained(tmp_path)
    randomize_adapter(only_layer(model), seed=3)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), before)


def test_weights_beside_the_config_of_another_save_are_refused(tmp_path: Path) -> None:
    fsrl_model(features=[0, 1, 2]).save_pretrained(tmp_path / "one")
    fsrl_model(features=[3, 4, 5]).save_pretrained(tmp_path / "two")
    shutil.copy(tmp_path / "two" / CONFIG, tmp_path / "one" / CONFIG)
    with pytest.raises(ValueError, match="steer other features than adapter"):
        load(tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation": "relu"}, r"only tensors of the adapter.*threshold"),
        ({"activation": "jumprelu"}, r"only tensors of the adapter.*threshold"),
        ({"activation": "tanh"}, "`activation` must be one of"),
        ({"layer": 2}, r"only tensors of the adapter.*layers\.1"),
        ({"layer": 9}, "Layer 9 does not exist"),
        ({"features": [1, 2, 3]}, r"of shape \[\(3,\)\], found F32 of shape \(24,\)"),
        ({"rank": 2}, r"of shape \[\(24, 2\)\], found F32 of shape \(24, 16\)"),
        ({"sae": {"beside_adapter": "sae_layer_3"}}, "found no cfg.json"),
        ({"sae": None}, "needs `sae`"),
    ],
)
@pytest.mark.filterwarnings("ignore:The SAE was trained at layer 1")
def test_a_config_of_something_else_is_refused(
    changes: dict[str, Any], match: str, folder: Path
) -> None:
    edit_config(folder, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){match}"):
        load(folder)


def test_another_sae_is_refused(folder: Path) -> None:
    tiny_sae(seed=4).save_model(folder / "sae")
    with pytest.raises(ValueError, match=r"SAE has changed since .*`sae_info=None`"):
        load(folder)


@pytest.mark.parametrize("shape", [(D_SAE, 8), (D_SAE - 1, 16), (16, D_SAE), (D_SAE, 16, 1)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...], folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({key("weight"): torch.zeros(shape)}))
    with pytest.raises(ValueError, match=r"weight in .* of shape \[\(24, 16\)\]"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias", "threshold"])
def test_nonfinite_weights_are_reported(name: str, value: float, tmp_path: Path) -> None:
    model = fsrl_model()
    with torch.no_grad():
        only_layer(model).fsrl_adapter["default"].get_parameter(name)[3] = value
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"nan or inf.*default\.{name}.*earlier checkpoint"):
        load(tmp_path)


def test_transformers_takes_the_config_that_checks(folder: Path, saved: Path) -> None:
    base = tiny_model()
    with pytest.raises(ValueError, match="to transformers' load_adapter pass it as `peft_config`"):
        base.load_adapter(str(folder))
    base = tiny_model()
    base.load_adapter(str(folder), peft_config=FSRLConfig.from_pretrained(folder))
    assert torch.equal(logits(base), logits(load(saved)))
    edit_tensors(folder, lambda tensors: tensors.update({FOREIGN: torch.zeros(16, 32)}))
    with pytest.raises(ValueError, match="would replace weights of the base model"):
        tiny_model().load_adapter(str(folder), peft_config=FSRLConfig.from_pretrained(folder))


# Saves


def test_a_save_leaves_only_the_adapter(tmp_path: Path) -> None:
    model = fsrl_model()
    model.add_adapter("other", FSRLConfig(layer=1, sae=tiny_sae(seed=2)))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    one = {CONFIG, WEIGHTS, "sae"}
    assert {path.name for path in tmp_path.iterdir()} == one | {"README.md", "other"}
    assert {path.name for path in (tmp_path / "other").iterdir()} == one
    again = load(tmp_path / "other")
    again.save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy")["sae/cfg.json"] == contents(tmp_path)["other/sae/cfg.json"]


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_model_has_one_adapter_of_a_name(folder: Path) -> None:
    base = tiny_model()
    first = get_peft_model(base, FSRLConfig(layer=1, sae=tiny_sae()))
    with pytest.raises(ValueError, match=r"already has an FSRL adapter 'default'.*`unload\(\)`"):
        get_peft_model(base, FSRLConfig(layer=1, sae=tiny_sae()))
    with pytest.raises(ValueError, match="already has an FSRL adapter"):
        PeftModel.from_pretrained(base, folder)
    base = first.unload()
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder)), logits(load(folder)))


def test_transformers_own_save_over_ours_loads(folder: Path) -> None:
    base = tiny_model()
    base.add_adapter(FSRLConfig(layer=1, sae=tiny_sae()))
    randomize_adapter(only_layer(base), seed=77)
    base.save_pretrained(folder)
    torch.testing.assert_close(logits(load(folder)), logits(base))
