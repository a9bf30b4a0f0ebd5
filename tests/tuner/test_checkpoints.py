"""Checkpoints that were damaged, mixed up, or whose save was killed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import (
    D_SAE,
    fsrl_model,
    only_layer,
    randomise_adapter,
    tiny_model,
    tiny_sae,
    token_ids,
)
from peft_fsrl import FSRLConfig
from peft_fsrl.tuner.folder import compute_sha256, finish_save, replacing

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SUMS = "SHA256SUMS"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its SAE beside it; not to be modified."""
    folder = tmp_path_factory.mktemp("saved")
    fsrl_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of that checkpoint to damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def load(folder: Path, **settings: Any) -> PeftModel:
    return PeftModel.from_pretrained(tiny_model(), folder, **settings).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def without_sums(folder: Path) -> Path:
    """As a checkpoint that another program wrote."""
    (folder / SUMS).unlink()
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}, indent=2, sort_keys=True))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def key(name: str, layer: int = 1) -> str:
    return f"base_model.model.model.layers.{layer}.fsrl_adapter.{name}"


# Damage


def header_length(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


REGIONS: dict[str, Callable[[Path], int]] = {
    "nothing": lambda path: 0,
    "within the header's length": lambda path: 4,
    "before the header": lambda path: 8,
    "within the header": lambda path: 8 + header_length(path) // 2,
    "before the tensors": lambda path: 8 + header_length(path),
    "within the tensors": lambda path: (8 + header_length(path) + path.stat().st_size) // 2,
    "one byte short": lambda path: path.stat().st_size - 1,
}


@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("file", [WEIGHTS, "sae/sae_weights.safetensors"])
@pytest.mark.parametrize("region", REGIONS)
def test_truncated_tensors_do_not_load(
    region: str, file: str, with_sums: bool, folder: Path
) -> None:
    if not with_sums:
        without_sums(folder)
    os.truncate(folder / file, REGIONS[region](folder / file))
    with pytest.raises(Exception, match=r"not what was saved|[Hh]eader|[Mm]etadata|deserializ"):
        load(folder)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_truncated_config_does_not_load(size: int, folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text[:size])
    with pytest.raises(json.JSONDecodeError):
        load(folder)


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("bit", [0, 7])
def test_no_byte_of_the_weights_can_change_unnoticed(bit: int, folder: Path) -> None:
    original, size = (folder / WEIGHTS).read_bytes(), (folder / WEIGHTS).stat().st_size
    # All of the length and the header, and enough of the tensors to meet each of them.
    positions = [*range(0, 8 + header_length(folder / WEIGHTS), 7), *range(size - 1, 0, -97)]
    for position in positions:
        flip(folder / WEIGHTS, position, bit)
        with pytest.raises(ValueError, match=f"{WEIGHTS} in .* is not what was saved"):
            FSRLConfig.from_pretrained(folder)
        (folder / WEIGHTS).write_bytes(original)
    assert FSRLConfig.from_pretrained(folder).layer == 1


def test_no_byte_of_the_config_can_change_unnoticed(folder: Path) -> None:
    original = (folder / CONFIG).read_bytes()
    for position in range(0, len(original), 11):
        flip(folder / CONFIG, position)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                FSRLConfig.from_pretrained(folder)
            except (ValueError, TypeError, KeyError):
                continue
            finally:
                (folder / CONFIG).write_bytes(original)
        assert any("not what was saved" in str(warning.message) for warning in caught), position


def test_an_edited_config_warns_and_loads(folder: Path, saved: Path) -> None:
    edit_config(folder, base_model_name_or_path="elsewhere")
    with pytest.warns(UserWarning, match=rf"{CONFIG} in .*delete its line from {SUMS}"):
        model = load(folder)
    assert torch.equal(logits(model), logits(load(saved)))
    sums = (folder / SUMS).read_text().splitlines()
    (folder / SUMS).write_text("\n".join(line for line in sums if CONFIG not in line))
    assert torch.equal(logits(load(folder)), logits(model))


@pytest.mark.parametrize("text", ["garbage", "0123  x\n", "\0\0\0"])
def test_damaged_checksums_do_not_pass(text: str, folder: Path) -> None:
    (folder / SUMS).write_text(text)
    with pytest.raises(ValueError, match=rf"as sha256sum writes them.*delete {SUMS}"):
        load(folder)


def test_the_weights_of_a_checkpoint_must_be_there(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="expected a file, found none"):
        load(folder)


def test_sums_are_those_of_sha256sum(folder: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name}: OK" for name in (CONFIG, WEIGHTS, "sae/cfg.json")]


def test_no_byte_of_the_saes_tensors_can_change_unnoticed(folder: Path) -> None:
    path = folder / "sae" / "sae_weights.safetensors"
    original, start = path.read_bytes(), 8 + header_length(path)
    for position in range(start, len(original), 211):
        flip(path, position)
        with pytest.raises(ValueError, match="The SAE has changed since this adapter was saved"):
            load(folder)
        path.write_bytes(original)
    load(folder)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("apply_b_dec_to_input", False), ("normalize_activations", "layer_norm"), ("d_sae", 23)],
)
def test_the_saes_settings_cannot_change_unnoticed(setting: str, value: Any, folder: Path) -> None:
    path = without_sums(folder) / "sae" / "cfg.json"
    cfg = json.loads(path.read_text())
    assert cfg[setting] != value
    path.write_text(json.dumps({**cfg, setting: value}))
    with pytest.raises((ValueError, RuntimeError), match=r"SAE has changed|size mismatch"):
        load(folder)


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


# Weights and config that do not belong together, without checksums to tell


def refused(missing: str, adapter_name: str = "default") -> Any:
    message = rf"not belong to this adapter's config.*expected \[.*{adapter_name}\.{missing}'\]"
    return pytest.raises(ValueError, match=message)


@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}])
@pytest.mark.parametrize("missing", ["weight", "bias", "threshold"])
def test_missing_tensors_are_refused(missing: str, settings: dict[str, Any], folder: Path) -> None:
    edit_tensors(without_sums(folder), lambda tensors: tensors.pop(key(missing)))
    with refused(missing):
        load(folder, **settings)


def test_missing_tensors_are_refused_by_the_auto_class(folder: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    edit_tensors(without_sums(folder), lambda tensors: tensors.pop(key("bias")))
    edit_config(folder, base_model_name_or_path=str(tmp_path / "base"))
    with refused("bias"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["weight", "bias", "threshold"])
def test_transformers_refuses_missing_tensors_too(
    missing: str, folder: Path, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    edit_tensors(without_sums(folder), lambda tensors: tensors.pop(key(missing)))
    edit_config(folder, base_model_name_or_path=str(tmp_path / "base"))
    model = tiny_model()
    with refused(missing):
        model.load_adapter(str(folder))
    assert torch.equal(logits(model), logits(tiny_model()))
    with refused(missing):
        AutoModelForCausalLM.from_pretrained(folder)


def test_transformers_refuses_tensors_for_another_place_too(folder: Path) -> None:
    edit_tensors(
        without_sums(folder),
        lambda tensors: tensors.update({key("bias", layer=2): torch.zeros(D_SAE)}),
    )
    with pytest.raises(ValueError, match=r"found \[.*layers\.2\.fsrl_adapter"):
        tiny_model().load_adapter(str(folder))


def test_transformers_reports_nonfinite_weights_too(tmp_path: Path) -> None:
    model = fsrl_model()
    with torch.no_grad():
        only_layer(model).fsrl_adapter["default"].bias[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"nan or inf.*default\.bias.*earlier checkpoint"):
        tiny_model().load_adapter(str(tmp_path))


def test_an_adapter_that_is_refused_is_not_added(folder: Path) -> None:
    edit_tensors(without_sums(folder), lambda tensors: tensors.pop(key("bias")))
    model = fsrl_model()
    before = logits(model)
    with refused("bias", "other"):
        model.load_adapter(folder, "other")
    assert set(model.peft_config) == set(only_layer(model).fsrl_adapter) == {"default"}
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("name", ["style", "o", "model"])
def test_an_adapter_whose_name_occurs_in_others_loads(name: str, folder: Path) -> None:
    model = fsrl_model()
    model.add_adapter(f"{name}2", FSRLConfig(layer=1, sae=tiny_sae(seed=2)))
    model.load_adapter(folder, name)
    model.set_adapter(name)
    assert torch.equal(logits(model), logits(load(folder)))
    edit_tensors(without_sums(folder), lambda tensors: tensors.pop(key("bias")))
    with refused("bias", name):
        model.load_adapter(folder, name)


def test_loading_over_an_adapter_checks_as_well(folder: Path) -> None:
    # As a trainer does when it resumes.
    model = fsrl_model()
    flip(folder / WEIGHTS, 1500)
    with pytest.raises(ValueError, match="not what was saved"):
        model.load_adapter(folder, "default", is_trainable=True)
    edit_tensors(without_sums(folder), lambda tensors: tensors.pop(key("bias")))
    with refused("bias"):
        model.load_adapter(folder, "default", is_trainable=True)
    assert set(only_layer(model).fsrl_adapter) == {"default"}


def test_tensors_for_another_place_are_refused(folder: Path) -> None:
    edit_tensors(
        without_sums(folder),
        lambda tensors: tensors.update({key("bias", layer=7): torch.zeros(D_SAE)}),
    )
    with pytest.raises(ValueError, match=r"found \['base_model.*layers\.7\.fsrl_adapter"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation": "relu"}, r"activation='relu'.*found \[.*threshold"),
        ({"activation": "jumprelu"}, r"activation='jumprelu'.*expected \[.*log_threshold"),
        ({"activation": "tanh"}, "`activation` must be one of"),
        ({"layer": 2}, r"layer=2.*expected \[.*layers\.2"),
        ({"layer": 9}, "Layer 9 does not exist"),
        ({"features": [1, 2, 3]}, r"size mismatch.*\[24, 16\].*\[3, 16\]"),
        ({"rank": 2}, r"size mismatch.*\[24, 16\].*\[24, 2\]"),
        ({"sae_info": {"fingerprint": "0" * 64}}, "SAE has changed"),
        ({"sae": {"beside_adapter": "nowhere"}}, "found no cfg.json"),
        ({"sae": None}, "needs `sae`"),
    ],
)
@pytest.mark.filterwarnings("ignore:The SAE was trained on the output of layer 1")
def test_a_config_of_something_else_is_refused(
    changes: dict[str, Any], match: str, folder: Path
) -> None:
    edit_config(without_sums(folder), **changes)
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=f"(?s){match}"):
        load(folder)


@pytest.mark.parametrize("shape", [(D_SAE, 8), (D_SAE - 1, 16), (16, D_SAE), (D_SAE, 16, 1)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...], folder: Path) -> None:
    edit_tensors(
        without_sums(folder), lambda tensors: tensors.update({key("weight"): torch.zeros(shape)})
    )
    with pytest.raises(RuntimeError, match=r"size mismatch for .*weight"):
        load(folder)


def test_mismatched_sizes_may_be_ignored_on_request(folder: Path) -> None:
    edit_tensors(
        without_sums(folder), lambda tensors: tensors.update({key("bias"): torch.zeros(3)})
    )
    with pytest.warns(UserWarning, match=r"found shape torch\.Size\(\[3\]\)|missing adapter keys"):
        load(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias", "threshold"])
def test_nonfinite_weights_are_reported(name: str, value: float, tmp_path: Path) -> None:
    model = fsrl_model()
    with torch.no_grad():
        only_layer(model).fsrl_adapter["default"].get_parameter(name)[3] = value
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"nan or inf.*default\.{name}.*earlier checkpoint"):
        load(tmp_path)


# Saves


def test_a_save_leaves_only_the_checkpoint(tmp_path: Path) -> None:
    model = fsrl_model()
    model.add_adapter("other", FSRLConfig(layer=1, sae=tiny_sae(seed=2)))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    one = {CONFIG, WEIGHTS, SUMS, "sae"}
    assert {path.name for path in tmp_path.iterdir()} == one | {"README.md", "other"}
    assert {path.name for path in (tmp_path / "other").iterdir()} == one
    assert load(tmp_path / "other").peft_config["default"].sae == {"beside_adapter": "sae"}


def test_a_save_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("---\ntags: [mine]\n---\n# My own card\n")
    fsrl_model().save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    card = (tmp_path / "README.md").read_text()
    assert "# My own card" in card


def test_a_save_that_fails_changes_nothing(
    folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        fsrl_model(sae=tiny_sae("topk")).save_pretrained(folder)
    assert contents(folder) == contents(saved)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): compute_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_weights_of_the_other_kind_do_not_stay(folder: Path) -> None:
    model = fsrl_model(activation="relu")
    model.save_pretrained(folder, safe_serialization=False)
    assert not (folder / WEIGHTS).exists()
    assert torch.equal(logits(load(folder)), logits(model))
    model.save_pretrained(folder)
    assert not (folder / "adapter_model.bin").exists()
    assert torch.equal(logits(load(folder)), logits(model))


def test_other_processes_and_other_methods_save_as_ever(tmp_path: Path) -> None:
    fsrl_model().save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert contents(tmp_path / "rank1") == {}
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora" / SUMS).exists()
    PeftModel.from_pretrained(tiny_model(), tmp_path / "lora")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory"):
        fsrl_model().save_pretrained(str(tmp_path / "file"))


def test_transformers_own_save_over_ours_loads(folder: Path) -> None:
    base = tiny_model()
    base.add_adapter(FSRLConfig(layer=1, sae=tiny_sae()))
    randomise_adapter(only_layer(base), seed=77)
    base.save_pretrained(folder)
    assert not (folder / SUMS).exists()
    torch.testing.assert_close(logits(load(folder)), logits(base))


def test_staging_of_a_killed_save_is_removed_later(folder: Path) -> None:
    old, fresh = folder / ".fsrl_saving_old", folder / ".fsrl_saving_fresh"
    for path in (old, fresh):
        path.mkdir()
        (path / WEIGHTS).write_bytes(b"half")
    hours_ago = time.time() - 2 * 3600
    os.utime(old, (hours_ago, hours_ago))
    fsrl_model().save_pretrained(folder)
    assert not old.exists()
    # It may be another process's, at work.
    assert fresh.exists()


def test_two_saves_at_once_leave_one_of_them(folder: Path) -> None:
    with replacing(folder) as first, replacing(folder) as second:
        for staging, name in ((first, "first"), (second, "second")):
            (staging / CONFIG).write_text(name)
            (staging / WEIGHTS).write_text(name)
    assert (folder / CONFIG).read_text() == (folder / WEIGHTS).read_text() == "first"
    assert not list(folder.glob(".fsrl*"))


def test_finishing_a_save_can_itself_be_interrupted(folder: Path, tmp_path: Path) -> None:
    new = fsrl_model(activation="relu", sae=tiny_sae("topk"))
    new.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", folder / ".fsrl_saved")
    # As if the first of its files had been moved when the process died.
    os.replace(folder / ".fsrl_saved" / CONFIG, folder / CONFIG)
    assert torch.equal(logits(load(folder)), logits(new))
    finish_save(folder)
    assert contents(folder) == contents(tmp_path / "new")


KILLED = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
root = sys.argv[2]
import torch
from helpers import fsrl_model, only_layer, tiny_model, tiny_sae, token_ids
from peft import PeftModel
import peft.peft_model
import peft_fsrl.sae.frozen

torch.set_num_threads(1)
out = os.path.join(root, "out")


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def half(path):
    with open(path, "wb") as file:
        file.write(b"half of it")


def kill_at(moment):
    if moment == "weights":
        peft.peft_model.safe_save_file = lambda tensors, path, **_: (half(path), die())
        return
    if moment == "sae":
        peft_fsrl.sae.frozen.FrozenSAE.save = lambda self, path: (
            os.makedirs(path), half(path + "/sae_weights.safetensors"), die()
        )
        return
    count = 0

    def hook(event, args):
        nonlocal count
        touches = any(isinstance(arg, (str, os.PathLike)) and out in str(arg) for arg in args)
        changes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove") or (
            event == "open" and isinstance(args[1], str) and args[1][:1] in "wax"
        )
        if touches and changes:
            count += 1
            if count == moment:
                die()

    sys.addaudithook(hook)


old = fsrl_model()
new = fsrl_model(activation="jumprelu", sae=tiny_sae("topk", seed=5), features=[1, 2, 3, 20])
expected = {"old": logits(old), "new": logits(new)}
before = os.path.join(root, "before")
old.save_pretrained(before)
for how in ("over", "fresh"):
    for moment in ["weights", "sae", *range(1, 1000)]:
        shutil.rmtree(out, ignore_errors=True)
        if how == "over":
            shutil.copytree(before, out)
        child = os.fork()
        if child == 0:
            kill_at(moment)
            new.save_pretrained(out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed:
            assert os.WEXITSTATUS(status) == 0
        try:
            found = logits(PeftModel.from_pretrained(tiny_model(), out).eval())
            state = [name for name, value in expected.items() if torch.equal(found, value)]
        except Exception as error:
            state = [type(error).__name__]
        print(how, moment, killed, *state)
        if not killed:
            break
"""


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    # Over another checkpoint it is that one until all is written; in a new folder there is none.
    for how, before in (("over", "old"), ("fresh", "ValueError")):
        moments = [row[1:] for row in rows if row[0] == how]
        assert [row[0] for row in moments[:2]] == ["weights", "sae"]
        states = [state for _, _, state in moments]
        new = states.count("new")
        assert states == [before] * (len(states) - new) + ["new"] * new
        # Staging has a dozen steps, putting the files in place as many, then nobody was killed.
        assert new >= 8
        assert len(states) - new >= 10
        assert [killed for _, killed, _ in moments] == ["True"] * (len(moments) - 1) + ["False"]
