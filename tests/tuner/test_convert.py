"""Checkpoints of the first research code become ours, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import helpers
from peft_fsrl import freeze_sae
from peft_fsrl.tuner.convert import convert_research_checkpoint

THRESHOLDS = {"soft_threshold": "soft_threshold", "log_threshold": "jumprelu", "": "relu"}


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], said: dict[str, Any] | None = None
) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_weights.safetensors")
    (folder / "fsrl_adapter_config.json").write_text(json.dumps(said or {}))
    return folder


def random_tensors(threshold: str = "", magnitude: Tensor | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (helpers.D_SAE, helpers.D_IN)
    tensors = {
        "adapter_linear.weight": torch.randn(shape, generator=generator) * 0.3,
        "adapter_linear.bias": torch.randn(helpers.D_SAE, generator=generator) * 0.3,
    }
    if threshold:
        values = torch.rand(helpers.D_SAE, generator=generator) * 0.3
        tensors[threshold] = values.log() if threshold == "log_threshold" else values
    if magnitude is not None:
        tensors["steering_magnitude"] = magnitude
    return tensors


@pytest.fixture
def sae_folder(tmp_path: Path) -> Path:
    helpers.tiny_sae().save_model(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("magnitude", [None, 1.7, -0.6, "vector"])
@pytest.mark.parametrize("clamped", [True, False])
def test_outputs_are_those_of_the_research_code(
    tmp_path: Path, sae_folder: Path, threshold: str, magnitude: float | str | None, clamped: bool
) -> None:
    if isinstance(magnitude, float) and magnitude < 0 and threshold != "soft_threshold":
        pytest.skip("refused, as another test shows")
    factor = {None: None, "vector": torch.linspace(0.5, 2, helpers.D_SAE)}.get(magnitude, ...)
    factor = torch.tensor(magnitude) if factor is ... else factor
    tensors = random_tensors(threshold, factor)
    source = write_checkpoint(tmp_path / "old", tensors, {"sae_path": str(sae_folder), "layer": 1})
    config = convert_research_checkpoint(
        source, tmp_path / "new", helpers.tiny_model(), non_negative=clamped
    )
    assert (config.activation, config.non_negative) == (THRESHOLDS[threshold], clamped)
    model = PeftModel.from_pretrained(helpers.tiny_model(), tmp_path / "new").eval()

    # The research code: v = magnitude * act(linear(x~)), x' = x + decode(relu(f + v)) - decode(f).
    sae, ids = helpers.tiny_sae(), helpers.token_ids()
    plain = helpers.tiny_model()

    def steer(module: Any, args: Any, x: Tensor) -> Tensor:
        u = torch.nn.functional.linear(
            sae.process_sae_in(x), tensors["adapter_linear.weight"], tensors["adapter_linear.bias"]
        )
        v, _ = helpers.naive_vector(u, tensors.get(threshold), config.activation, 1e-2)
        v = v if factor is None else factor * v
        f = sae.encode(x)
        return x + sae.decode(torch.relu(f + v) if clamped else f + v) - sae.decode(f)

    plain.model.layers[1].register_forward_hook(steer)
    with torch.no_grad():
        expected, found = plain(ids).logits, model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, helpers.tiny_model()(ids).logits, atol=1e-3)


def test_layer_comes_from_the_sae_and_the_sae_may_be_given(
    tmp_path: Path, sae_folder: Path
) -> None:
    source = write_checkpoint(tmp_path / "old", random_tensors())
    config = convert_research_checkpoint(
        source, tmp_path / "new", helpers.tiny_model(), sae=str(sae_folder), non_negative=True
    )
    assert config.layer == 1
    assert "base_model.model.model.layers.1.fsrl_adapter.weight" in load_file(
        tmp_path / "new" / "adapter_model.safetensors"
    )


def test_a_checkpoint_as_the_research_code_names_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {
        "base_model_name": "gemma-2-2b",
        "base_sae_release": "gemma-scope-2b-pt-res",
        "base_sae_id": "layer_1/width_65k/average_l0_72",
    }
    asked = []

    def load(reference: Any) -> Any:
        asked.append(reference)
        return freeze_sae(helpers.tiny_sae())

    monkeypatch.setattr("peft_fsrl.sae.loading.load_sae", load)
    source = write_checkpoint(tmp_path / "old", random_tensors("soft_threshold"), said)
    base = helpers.tiny_model()
    base.config._name_or_path = base.name_or_path = "google/gemma-2-2b-it"
    config = convert_research_checkpoint(source, tmp_path / "new", base, non_negative=False)
    expected = {"release": "gemma-scope-2b-pt-res", "sae_id": "layer_1/width_65k/average_l0_72"}
    assert asked == [expected]
    assert config.sae == expected
    assert config.layer == 1
    assert config.base_model_name_or_path == "google/gemma-2-2b-it"
    with pytest.raises(TypeError, match="non_negative"):
        convert_research_checkpoint(source, tmp_path / "again", base)


def test_what_cannot_be_converted_is_refused(tmp_path: Path, sae_folder: Path) -> None:
    model, said = helpers.tiny_model(), {"sae_path": str(sae_folder)}
    with pytest.raises(FileNotFoundError, match=r"adapter_weights.safetensors missing"):
        convert_research_checkpoint(tmp_path, tmp_path / "new", model, non_negative=True)
    broken = {
        "unknown": ({**random_tensors(), "other": torch.ones(1)}, said, "other"),
        "both": (
            {**random_tensors("soft_threshold"), "log_threshold": torch.ones(1)},
            said,
            "at most one",
        ),
        "nameless": (random_tensors(), {}, "names no SAE"),
        "negative": (random_tensors("", torch.tensor(-1.0)), said, "must be positive"),
        "narrow": (
            {**random_tensors(), "adapter_linear.weight": torch.ones(helpers.D_SAE, 3)},
            said,
            "Expected shape",
        ),
    }
    for name, (tensors, config, message) in broken.items():
        source = write_checkpoint(tmp_path / name, tensors, config)
        with pytest.raises(ValueError, match=message):
            convert_research_checkpoint(source, tmp_path / "new", model, non_negative=True)
        assert not (tmp_path / "new").exists()
    source = write_checkpoint(tmp_path / "good", random_tensors(), said)
    convert_research_checkpoint(source, tmp_path / "new", model, non_negative=True)
    with pytest.raises(FileExistsError, match="already holds an adapter"):
        convert_research_checkpoint(source, tmp_path / "new", model, non_negative=True)
