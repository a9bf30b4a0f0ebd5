"""``FSRLModel`` in PEFT: what it wraps, what the wrapped model computes, saving and loading."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers import (
    D_IN,
    D_SAE,
    FAMILIES,
    LAYERS,
    fsrl_model,
    naive_steer,
    naively_steered,
    only_layer,
    tiny_model,
    tiny_sae,
    token_ids,
)
from peft_fsrl import FSRLConfig, FSRLLayer
from peft_fsrl.functional import ACTIVATIONS
from peft_fsrl.steering import SteeringMonitor, adapter_configs
from peft_fsrl.training.penalty import SparsityPenalty

PATHS = {"gpt2": "transformer.h.{}", "gptj": "transformer.h.{}", "gpt_neox": "gpt_neox.layers.{}"}


def parameters_of(layer: FSRLLayer) -> tuple[Tensor, Tensor, Tensor]:
    adapter = layer.fsrl_adapter["default"]
    return adapter.weight, adapter.bias, adapter.threshold


@pytest.mark.parametrize("family", FAMILIES)
def test_steers_the_output_of_the_layer(family: str) -> None:
    sae = tiny_sae("jumprelu", dtype="float64")
    base, ids = tiny_model(family).double(), token_ids()
    plain = base(ids, output_hidden_states=True).hidden_states
    model = fsrl_model(copy.deepcopy(base), sae=sae)
    layer = only_layer(model)
    assert layer.layer_name == PATHS.get(family, "model.layers.{}").format(1)
    out = model(ids, output_hidden_states=True)
    for before in (0, 1):
        assert torch.equal(out.hidden_states[before], plain[before])
    expected, v, _ = naive_steer(sae, plain[2], *parameters_of(layer))
    torch.testing.assert_close(out.hidden_states[2], expected, rtol=1e-10, atol=1e-11)
    assert (v != 0).any(dim=-1).all(), "the test needs every token to be steered"
    with naively_steered(base, layer, sae):
        logits = base(ids).logits
    torch.testing.assert_close(out.logits, logits, rtol=1e-10, atol=1e-11)
    assert not torch.allclose(logits, base(ids).logits)


@pytest.mark.parametrize("index", range(LAYERS))
def test_every_layer_can_be_steered(index: int) -> None:
    sae = tiny_sae(metadata={}, dtype="float64")
    base, ids = tiny_model().double(), token_ids()
    model = fsrl_model(copy.deepcopy(base), sae=sae, layer=index)
    with naively_steered(base, only_layer(model), sae):
        expected = base(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_task_types(task_type: str | None) -> None:
    expected = fsrl_model()(token_ids()).logits
    assert torch.equal(fsrl_model(task_type=task_type)(input_ids=token_ids()).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_generation_with_and_without_a_cache(family: str) -> None:
    model = fsrl_model(tiny_model(family).double())
    ids = token_ids(2, 5)
    # The second prompt is two tokens shorter and padded on the left.
    ids[1, :2] = 0
    mask = (ids != 0).long()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **settings)
    whole = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached, whole)
    for row, start in ((0, 0), (1, 2)):
        prompt = ids[row : row + 1, start:]
        alone = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **settings
        )
        assert torch.equal(alone[0], cached[row, start:])


def test_disabling_gives_the_base_bit_for_bit() -> None:
    base, model, ids = tiny_model(), fsrl_model(), token_ids()
    steered = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert torch.equal(model(ids).logits, steered)
    assert not torch.equal(steered, base(ids).logits)


@pytest.mark.parametrize("architecture", ["standard", "temporal"])
def test_unload_gives_the_base_back(architecture: str) -> None:
    base = tiny_model()
    model = fsrl_model(sae=tiny_sae(architecture, seed=31))
    frozen = weakref.ref(only_layer(model).fsrl_sae["default"])
    restored = model.unload()
    assert torch.equal(restored(token_ids()).logits, base(token_ids()).logits)
    assert restored.state_dict().keys() == base.state_dict().keys()
    assert [type(m) for m in restored.modules()] == [type(m) for m in base.modules()]
    for module, twin in zip(restored.modules(), base.modules(), strict=True):
        assert len(module._forward_hooks) == len(twin._forward_hooks)
        assert len(module._forward_pre_hooks) == len(twin._forward_pre_hooks)
    assert vars(restored).keys() <= vars(base).keys() | {"name_or_path"}
    del model
    gc.collect()
    assert frozen() is None


def test_merging_is_refused_and_changes_nothing() -> None:
    model, ids = fsrl_model(), token_ids()
    before, state = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    attempts = [
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
        model.merge_adapter,
        model.unmerge_adapter,
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"cannot be merged.*unload\(\)"):
            attempt()
        assert only_layer(model).merged_adapters == []
    assert torch.equal(model(ids).logits, before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_merging_is_refused_before_anything_is_changed() -> None:
    # PEFT takes modules apart in order, and these stand before the first layer that refuses.
    model, ids = fsrl_model(modules_to_save=["embed_tokens"]), token_ids()
    before, modules = model(ids).logits, [type(module) for module in model.modules()]
    for attempt in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            attempt()
        assert [type(module) for module in model.modules()] == modules
    assert torch.equal(model(ids).logits, before)


def test_only_the_adapter_trains() -> None:
    model = fsrl_model()
    model(token_ids()).logits.square().mean().backward()
    prefix = "base_model.model.model.layers.1.fsrl_adapter.default."
    trained = {prefix + name for name in ("weight", "bias", "threshold")}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    assert model.get_nb_trainable_parameters()[0] == D_SAE * (D_IN + 2)


def test_checkpoint_holds_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    model = fsrl_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.fsrl_adapter."
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        key + "weight": (D_SAE, D_IN),
        key + "bias": (D_SAE,),
        key + "threshold": (D_SAE,),
        key + "identity": (32,),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "FSRL"
    assert config["sae"] == {"beside_adapter": "sae"}
    info = only_layer(model).fsrl_sae["default"].info
    assert config["sae_info"] == {"": info.to_dict()}
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
    }


RELOAD = """
import sys, torch
from peft import PeftModel, AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
import peft_fsrl
torch.set_num_threads(2)
root = sys.argv[1]
saved = torch.load(root + "/expected.pt")
for name in ("folder", "live"):
    base = AutoModelForCausalLM.from_pretrained(root + "/base")
    model = PeftModel.from_pretrained(base, root + "/" + name)
    assert torch.equal(model(saved["ids"]).logits, saved[name]), name
    model = AutoPeftModelForCausalLM.from_pretrained(root + "/" + name)
    assert torch.equal(model(saved["ids"]).logits, saved[name]), name
"""


def test_a_new_process_computes_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    sae = tiny_sae("gated", "layer_norm")
    sae.save_model(tmp_path / "the sae")
    monkeypatch.chdir(tmp_path)
    saved = {"ids": token_ids()}
    for name, reference in (("folder", "the sae"), ("live", sae)):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = fsrl_model(base, sae=reference)
        model.save_pretrained(tmp_path / name)
        saved[name] = model(saved["ids"]).logits.detach()
    torch.save(saved, tmp_path / "expected.pt")
    monkeypatch.chdir("/")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "folder" / "sae").exists()


@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}])
def test_loading(settings: dict[str, Any], tmp_path: Path) -> None:
    model, ids = fsrl_model(), token_ids()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, **settings)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    trainable = [p for p in loaded.parameters() if p.requires_grad]
    assert len(trainable) == (3 if settings.get("is_trainable") else 0)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_what_the_encoder_started(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    settings = {"activation": "relu", "init_weights": "encoder", "sae": tiny_sae("jumprelu")}
    # Its weights are random by now, not what the encoder would give.
    model, ids = fsrl_model(**settings), token_ids()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert adapter_configs(loaded)["default"].init_weights == "encoder"
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def gain_model(dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """Gains that steer visibly, on the SAE's own encoder."""
    config = FSRLConfig(layer=1, sae=tiny_sae("jumprelu"), activation="gain", **settings)
    model = get_peft_model(tiny_model().to(dtype), config).eval()
    with torch.no_grad():
        only_layer(model).fsrl_adapter["default"].gain.normal_(std=3.0)
    return model


@pytest.mark.parametrize("features", [None, [2, 3, 11]])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gains_and_their_encoder_are_saved_and_loaded(
    dtype: torch.dtype, low_cpu_mem_usage: bool, features: list[int] | None, tmp_path: Path
) -> None:
    model, ids = gain_model(dtype, features=features), token_ids()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in saved} == {"weight", "bias", "gain", "identity"}
    base = tiny_model().to(dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    own, found = (only_layer(m).fsrl_adapter["default"] for m in (model, loaded))
    for name in ("weight", "bias", "gain"):
        tensor = getattr(found, name)
        assert tensor.dtype == torch.float32
        # PEFT rounds parameters to the base's dtype on this way.
        tolerance = 2**-8 if name == "gain" and low_cpu_mem_usage else 0
        torch.testing.assert_close(tensor, getattr(own, name), rtol=tolerance, atol=0)
    if not low_cpu_mem_usage or dtype == torch.float32:
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with loaded.disable_adapter():
        assert not torch.equal(loaded(ids).logits, model(ids).logits)


def test_gains_as_one_of_several_adapters() -> None:
    model, ids = gain_model(), token_ids()
    expected = model(ids).logits
    model.add_adapter("other", FSRLConfig(layer=1, sae=tiny_sae(), init_scale=0.3))
    model.set_adapter("other")
    assert [n for n, p in model.named_parameters() if p.requires_grad and "default" in n] == []
    assert not torch.equal(model(ids).logits, expected)
    model.set_adapter("default")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [name.rpartition(".")[2] for name in trained] == ["gain"]
    assert torch.equal(model(ids).logits, expected)
    model.delete_adapter("other")
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    assert torch.equal(model.unload()(ids).logits, tiny_model()(ids).logits)


def test_gains_whose_penalty_is_left_out_are_noticed() -> None:
    model, ids = gain_model(l1_coeff=0.1).train(), token_ids()
    model(ids).logits.sum().backward()
    with pytest.warns(UserWarning, match="it trains without one"):
        model(ids)


def test_the_encoder_start_on_meta_stays_there() -> None:
    config = FSRLConfig(
        layer=1, sae=tiny_sae("jumprelu"), activation="relu", init_weights="encoder"
    )
    model = get_peft_model(tiny_model(), config, low_cpu_mem_usage=True)
    assert only_layer(model).fsrl_adapter["default"].weight.is_meta
    assert not only_layer(model).fsrl_sae["default"].W_dec.is_meta


def test_loading_under_another_name(tmp_path: Path) -> None:
    model, ids = fsrl_model(), token_ids()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, adapter_name="other")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.load_adapter(tmp_path, adapter_name="third")
    layer = only_layer(loaded)
    assert layer.fsrl_sae["third"] is layer.fsrl_sae["other"]
    loaded.set_adapter("third")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again", selected_adapters=["third"])
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "again" / "third")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_saving_from_another_dtype_keeps_the_sae(tmp_path: Path) -> None:
    model = fsrl_model()
    fingerprint = adapter_configs(model)["default"].sae_info[""]["fingerprint"]
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert only_layer(loaded).fsrl_sae["default"].info.fingerprint == fingerprint


def test_a_changed_sae_is_refused(tmp_path: Path) -> None:
    tiny_sae().save_model(tmp_path / "sae_folder")
    model = fsrl_model(sae=str(tmp_path / "sae_folder"))
    model.save_pretrained(tmp_path / "adapter")
    before = adapter_configs(model)["default"].sae_info[""]["fingerprint"]
    changed = tiny_sae()
    with torch.no_grad():
        changed.b_enc[0] += 1e-3
    changed.save_model(tmp_path / "sae_folder")
    base = tiny_model()
    with pytest.raises(ValueError, match=f"SAE has changed.*expected fingerprint {before[:16]}"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not any(isinstance(module, FSRLLayer) for module in base.modules())


def test_sae_of_another_width() -> None:
    base = tiny_model()
    with pytest.raises(
        ValueError, match=r"width 12, but LlamaForCausalLM has hidden size 16.*model"
    ):
        get_peft_model(base, FSRLConfig(layer=1, sae=tiny_sae(d_in=12)))
    assert not any(isinstance(module, FSRLLayer) for module in base.modules())


@pytest.mark.parametrize("layer", [3, 99])
def test_layer_out_of_range(layer: int) -> None:
    with pytest.raises(
        ValueError, match=f"Layer {layer} does not exist.* 3 decoder layers, 0 to 2"
    ):
        get_peft_model(tiny_model(), FSRLConfig(layer=layer, sae=tiny_sae()))


class Strange(nn.Module):
    """A model whose layers stand under no usual name."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(D_IN, D_IN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def test_decoder_layers_that_cannot_be_found_can_be_named() -> None:
    with pytest.raises(ValueError, match=r"decoder layers.*found none.*target_modules=") as e:
        get_peft_model(Strange(), FSRLConfig(layer=1, sae=tiny_sae()))
    assert "named_modules()" in str(e.value)
    base = Strange()
    x = torch.randn(2, 3, D_IN)
    first = base.steps[1](base.steps[0](x))
    last = base.steps[2]
    model = fsrl_model(base, target_modules=["steps.1"], task_type=None)
    expected, _, _ = naive_steer(tiny_sae(), first, *parameters_of(only_layer(model)))
    torch.testing.assert_close(model(x), last(expected))


def test_target_modules_may_be_several_and_anything() -> None:
    model = fsrl_model(target_modules=r"model\.layers\.[02]\.mlp", sae=tiny_sae(metadata={}))
    layers = [module for module in model.modules() if isinstance(module, FSRLLayer)]
    assert [layer.layer_name for layer in layers] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert layers[0].fsrl_sae["default"] is layers[1].fsrl_sae["default"]
    assert not torch.equal(model(token_ids()).logits, tiny_model()(token_ids()).logits)


def test_a_module_that_returns_a_model_output_can_be_steered() -> None:
    sae = tiny_sae()
    base, ids = tiny_model(), token_ids()
    hidden = base.model(ids).last_hidden_state
    model = fsrl_model(copy.deepcopy(base), target_modules=["model"], sae=sae)
    expected, _, _ = naive_steer(sae, hidden, *parameters_of(only_layer(model)))
    torch.testing.assert_close(model(ids).logits, base.lm_head(expected))


def test_the_hook_name_gives_the_layer() -> None:
    for hook, index in (("blocks.0.hook_resid_post", 0), ("blocks.2.hook_resid_pre", 1)):
        sae = tiny_sae(metadata={"hook_name": hook})
        model = get_peft_model(tiny_model(), FSRLConfig(sae=sae))
        assert only_layer(model).layer_name == f"model.layers.{index}"
        assert adapter_configs(model)["default"].layer == index


@pytest.mark.parametrize("hook", [None, "blocks.1.attn.hook_q", "blocks.0.hook_resid_pre"])
def test_no_layer_given_and_none_in_the_hook_name(hook: str | None) -> None:
    sae = tiny_sae(metadata={} if hook is None else {"hook_name": hook})
    with pytest.raises(ValueError, match=r"needs `layer` .*hook name"):
        get_peft_model(tiny_model(), FSRLConfig(sae=sae))


def test_sae_of_another_layer_warns() -> None:
    with pytest.warns(UserWarning, match=r"trained at layer 1 \(hook.*layer=2 will be"):
        get_peft_model(tiny_model(), FSRLConfig(layer=2, sae=tiny_sae()))


@pytest.mark.parametrize(
    ("hook", "path"),
    [
        ("blocks.1.hook_resid_post", "model.layers.1"),
        ("blocks.1.hook_mlp_out", "model.layers.1.mlp"),
        ("blocks.1.hook_attn_out", "model.layers.1.self_attn"),
    ],
)
def test_the_place_inside_a_layer_is_the_saes(hook: str, path: str) -> None:
    model = get_peft_model(
        tiny_model(), FSRLConfig(layer=1, sae=tiny_sae(metadata={"hook_name": hook}))
    )
    assert only_layer(model).layer_name == path


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_in"])
def test_places_that_cannot_be_steered_are_refused(hook: str) -> None:
    sae = tiny_sae(metadata={"hook_name": hook})
    with pytest.raises(ValueError, match=rf"trained at hook '{hook}', which is not a place"):
        get_peft_model(tiny_model(), FSRLConfig(layer=1, sae=sae))
    model = get_peft_model(tiny_model(), FSRLConfig(target_modules=["layers.1"], sae=sae))
    assert only_layer(model).layer_name == "model.layers.1"


@pytest.mark.parametrize(("family", "name"), [("llama", "o_proj"), ("gpt2", "c_proj")])
def test_heads_are_steered_before_they_are_projected(family: str, name: str) -> None:
    sae, ids = tiny_sae(metadata={"hook_name": "blocks.1.attn.hook_z"}), token_ids()
    base = tiny_model(family)
    model = fsrl_model(copy.deepcopy(base), sae=sae, layer=1)
    layer = only_layer(model)
    assert layer.layer_name.rpartition(".")[2] == name
    projection = base.get_submodule(layer.layer_name)

    def steer(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return naive_steer(sae, args[0], *layer.fsrl_adapter["default"].parameters())[0], *args[1:]

    hook = projection.register_forward_pre_hook(steer)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)
        hook.remove()
        assert not torch.allclose(model(ids).logits, base(ids).logits, rtol=1e-3)


@pytest.mark.parametrize(
    ("trained_on", "name", "is_other"),
    [
        ("gemma-2-2b", "google/gemma-2-2b", False),
        ("gemma-2-2b", "google/gemma-2-2b-it", False),
        ("google/gemma-2-2b-it", "/models/gemma-2-2b/", False),
        ("gemma-2-2b", "", False),
        (None, "google/gemma-2-2b", False),
        ("gpt2-small", "google/gemma-2-2b", True),
        ("gemma-2-9b", "google/gemma-2-2b", True),
    ],
)
def test_sae_of_another_model_warns(trained_on: str | None, name: str, is_other: bool) -> None:
    base = tiny_model()
    base.config._name_or_path = base.name_or_path = name
    metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": trained_on}
    config = FSRLConfig(layer=1, sae=tiny_sae(metadata=metadata))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(base, config)
    found = [w for w in caught if "The SAE was trained on" in str(w.message)]
    assert bool(found) == is_other
    assert all(repr(trained_on) in str(w.message) and repr(name) in str(w.message) for w in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_start_is_not_dead(dtype: torch.dtype) -> None:
    model = get_peft_model(
        tiny_model().to(dtype), FSRLConfig(layer=1, sae=tiny_sae()), autocast_adapter_dtype=False
    )
    weight = only_layer(model).fsrl_adapter["default"].weight
    assert weight.dtype == dtype
    assert (weight != 0).float().mean() > 0.9
    assert weight.abs().max() < 1e-5


def test_bfloat16_base_with_a_float32_adapter() -> None:
    sae = tiny_sae("jumprelu")
    model, ids = fsrl_model(tiny_model().bfloat16(), sae=sae), token_ids()
    layer = only_layer(model)
    assert {p.dtype for p in layer.fsrl_adapter.parameters()} == {torch.float32}
    with model.disable_adapter():
        x = model(ids, output_hidden_states=True).hidden_states[2]
    out = model(ids, output_hidden_states=True)
    expected, _, _ = naive_steer(sae, x.float(), *parameters_of(layer))
    assert out.hidden_states[2].dtype == torch.bfloat16
    # Rounded once, at the end.
    torch.testing.assert_close(out.hidden_states[2].float(), expected, rtol=2**-7, atol=2**-7)
    out.logits.float().mean().backward()
    assert layer.fsrl_adapter["default"].weight.grad.dtype == torch.float32


def test_sae_dtype() -> None:
    model = fsrl_model(sae_dtype="bfloat16")
    assert only_layer(model).fsrl_sae["default"].dtype == torch.bfloat16
    assert adapter_configs(model)["default"].sae_info[""]["dtype"] == "float32"
    with pytest.raises(ValueError, match=r"`sae_dtype` must name a floating-point dtype.*'int8'"):
        get_peft_model(tiny_model(), FSRLConfig(layer=1, sae=tiny_sae(), sae_dtype="int8"))


def test_follows_the_model() -> None:
    model, ids = fsrl_model(), token_ids()
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        assert only_layer(model).fsrl_sae["default"].dtype == dtype
        assert model(ids).logits.dtype == dtype


def penalized_gradients(model: PeftModel) -> dict[str, Tensor]:
    records = []
    model.zero_grad()
    with SteeringMonitor(model, records.append):
        logits = model(input_ids=token_ids(), use_cache=False).logits
    [record] = records
    (logits.square().mean() + SparsityPenalty(model)(record)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if "fsrl" in n}


# transformers 5.23 renamed the method.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_checkpointing(activation: str, use_reentrant: bool) -> None:
    settings = {"l0_coeff": 0.3} if activation == "jumprelu" else {}
    model = fsrl_model(
        activation=activation, l1_coeff=0.7, jumprelu_bandwidth=0.5, **settings
    ).train()
    expected = penalized_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    # Older releases of transformers checkpoint `__call__`, and with it the hook that steers.
    if use_reentrant and "__call__" in vars(GradientCheckpointingLayer):
        with pytest.raises(RuntimeError, match="is detached and would not affect training"):
            penalized_gradients(model)
        return
    actual = penalized_gradients(model)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(actual[name], gradient)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("architecture", ["gated", "temporal"])
def test_copies_are_independent(duplicate: Any, architecture: str) -> None:
    model, ids = fsrl_model(sae=tiny_sae(architecture)), token_ids()
    expected = model(ids).logits
    other = duplicate(model)
    assert torch.equal(other(ids).logits, expected)
    assert only_layer(other).fsrl_sae["default"] is only_layer(model).fsrl_sae["default"]
    base = other.unload()
    assert torch.equal(base(ids).logits, tiny_model()(ids).logits)
    assert torch.equal(model(ids).logits, expected)


def test_two_adapters_on_two_layers() -> None:
    sae, ids = tiny_sae(metadata={}, dtype="float64"), token_ids()
    base = tiny_model().double()
    model = fsrl_model(copy.deepcopy(base), sae=sae, layer=2)
    model.add_adapter("low", FSRLConfig(layer=0, sae=sae, init_scale=0.3))
    low, high = (m for m in model.modules() if isinstance(m, FSRLLayer))
    with naively_steered(base, high, sae):
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-10, atol=1e-11)
    model.base_model.set_adapter(["default", "low"])
    low.fsrl_adapter["low"].requires_grad_(True)
    logits = model(ids).logits
    # A gradient reaches the lower adapter through the upper one's f, u and error term.
    naive = {
        name: p.detach().clone().requires_grad_()
        for name, p in low.fsrl_adapter["low"].named_parameters()
    }
    with naively_steered(base, high, sae), naively_steered(base, low, sae, naive, "low"):
        expected = base(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-11)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in low.fsrl_adapter["low"].named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, naive[name].grad, rtol=1e-8, atol=1e-10)


def test_a_second_adapter_waits_until_it_is_chosen() -> None:
    model, ids = fsrl_model(), token_ids()
    expected = model(ids).logits
    model.add_adapter("second", FSRLConfig(layer=1, sae=tiny_sae(), init_scale=0.3))
    layer = only_layer(model)
    assert torch.equal(model(ids).logits, expected)
    assert not any(p.requires_grad for p in layer.fsrl_adapter["second"].parameters())
    model.set_adapter("second")
    assert not torch.equal(model(ids).logits, expected)
    assert not any(p.requires_grad for p in layer.fsrl_adapter["default"].parameters())
    model.set_adapter("default")
    model.delete_adapter("second")
    assert set(layer.fsrl_sae) == {"default"}


def test_adapters_that_meet_on_one_layer_are_refused_before_anything_is_changed() -> None:
    model = fsrl_model()
    saes = {layer: tiny_sae(metadata={}, seed=layer) for layer in (0, 1)}
    model.add_adapter("second", FSRLConfig(layer=[0, 1], sae=saes, init_scale=0.3))
    layers = [module for module in model.modules() if isinstance(module, FSRLLayer)]
    before, expected = [layer.active_adapters for layer in layers], model(token_ids()).logits
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"Only one FSRL adapter.*layers\.1"):
        model.base_model.set_adapter(["default", "second"])
    assert [layer.active_adapters for layer in layers] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert torch.equal(model(token_ids()).logits, expected)


def test_contextual_sae_needs_the_whole_sequence() -> None:
    model, ids = fsrl_model(sae=tiny_sae("temporal")), token_ids()
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match=r"temporal.*reads the whole sequence.*use_cache=False"):
        model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **settings)
    model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)
    with model.disable_adapter():
        model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **settings)
    # In a mixed batch, those count that are named.
    model.add_adapter("other", FSRLConfig(layer=1, sae=tiny_sae()))
    cached = {"input_ids": ids, "attention_mask": mask, "use_cache": True, **settings}
    model.generate(adapter_names=["other"] * len(ids), **cached)
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"temporal.*reads the whole sequence"):
        model.generate(adapter_names=["default"] * len(ids), **cached)


def test_transformers_own_adapter_methods() -> None:
    base, ids = tiny_model(), token_ids()
    plain = base(ids).logits
    base.add_adapter(FSRLConfig(layer=1, sae=tiny_sae(), init_scale=0.3))
    assert not torch.equal(base(ids).logits, plain)
    base.disable_adapters()
    assert torch.equal(base(ids).logits, plain)


def test_auto_class_finds_the_base(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = fsrl_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_moved_models_release_the_old_sae() -> None:
    model = fsrl_model(sae=tiny_sae(seed=32), target_modules=["layers.0", "layers.1"])
    gc.collect()
    layers = [module for module in model.modules() if isinstance(module, FSRLLayer)]
    old = weakref.ref(layers[0].fsrl_sae["default"])
    model.to(torch.bfloat16)
    assert layers[0].fsrl_sae["default"] is layers[1].fsrl_sae["default"]
    # A live SAE is kept once more by its config, which has to save it.
    assert old() is adapter_configs(model)["default"].resolve_saes()[""]
    model.to(torch.float64)
    gc.collect()
    kept = [layers[0].fsrl_sae["default"], old()]
    assert len({id(sae) for sae in kept}) == 2


def test_an_sae_of_whole_sequences_never_reads_padding() -> None:
    model = fsrl_model(sae=tiny_sae("temporal"))
    ids = token_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"padded on the left.*Pad on the right"):
            model(ids, attention_mask=mask)
        # To the right padding changes nothing, whatever its id.
        mask = mask.flip(1)
        other = torch.where(mask > 0, ids, 7)
        found = [model(i, attention_mask=mask).logits[mask > 0] for i in (ids, other)]
        torch.testing.assert_close(*found)
        with model.disable_adapter():
            model(ids, attention_mask=mask.flip(1))
    whole = fsrl_model()
    whole(ids, attention_mask=mask.flip(1))


def test_an_adapter_on_a_base_of_eight_bits_is_in_float32() -> None:
    base = tiny_model()
    for parameter in base.model.layers[1].parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    for autocast in (True, False):
        config = FSRLConfig(layer=1, sae=tiny_sae())
        model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast)
        adapter = only_layer(model).fsrl_adapter["default"]
        assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
        assert adapter.weight.abs().max() > 0


def test_a_local_folder_is_no_other_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    sae = tiny_sae(
        metadata={"hook_name": "blocks.1.hook_resid_post", "model_name": "SmolLM2-135M-Instruct"}
    )
    get_peft_model(base, FSRLConfig(sae=sae))
