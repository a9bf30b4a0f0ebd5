"""Checkpoints that earlier releases wrote: they load, and compute what they computed then.

``golden/<release>/<kind>`` holds an adapter as that release saved it, with its SAE beside it, and
``example.safetensors``: an input and, in float64, what the method's formula made of it. These files
are never written again; a later release adds a folder of its own.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import peft_fsrl  # noqa: F401

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = sorted(path.parent for path in GOLDEN.rglob("adapter_config.json"))
# The SHA-256 of the names and hashes of a release's files: nobody changes them by accident.
SEALS = {"v0.1": "7b3eb0cd845d6596392b5fdf33dc9f0ad619298e3f4e60b38129ddeba2ebb86f"}


class Stack(nn.Module):
    """A base model of three layers that do nothing, so that only what steers is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: "-".join(path.parts[-2:]))
def test_it_loads_and_computes_what_it_did(folder: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(folder, tmp_path / "adapter")
    example = load_file(folder / "example.safetensors")
    model = PeftModel.from_pretrained(Stack(), adapter)
    found = model.base_model(example["x"])
    torch.testing.assert_close(found.double(), example["expected"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, example["x"], atol=0.1)
    # Saved again, it is the same adapter.
    model.save_pretrained(tmp_path / "again")
    saved = load_file(folder / "adapter_model.safetensors")
    state = get_peft_model_state_dict(model)
    assert state.keys() == saved.keys()
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], saved[key]) for key in saved)
    loaded = PeftModel.from_pretrained(Stack(), tmp_path / "again")
    assert torch.equal(loaded.base_model(example["x"]), found)


def test_every_release_has_its_checkpoints() -> None:
    found = {path.parts[-2:] for path in ADAPTERS}
    kinds = ("soft_threshold", "relu_rank", "two_layers", "target_modules")
    assert {("v0.1", kind) for kind in kinds} <= found


@pytest.mark.parametrize("release", SEALS)
def test_nobody_changed_them(release: str) -> None:
    digest = hashlib.sha256()
    for path in sorted((GOLDEN / release).rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(GOLDEN).as_posix().encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    assert digest.hexdigest() == SEALS[release]
