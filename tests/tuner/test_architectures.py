"""What an adapter can do, on several architectures: each against the formula or against itself."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers import (
    D_SAE,
    fsrl_model,
    naive_steer,
    naively_steered,
    only_layer,
    randomize_adapter,
    tiny_model,
    tiny_sae,
    token_ids,
)
from peft_fsrl import FSRLConfig, FSRLLayer
from peft_fsrl.steering import ablate_features, only_features, scale_steering, top_k_steering

SEVERAL = ["llama", "gemma3", "qwen3", "gpt2", "gpt_neox", "gptj"]
# Where each keeps the linear layer that writes the MLP's output.
LAST_LINEAR = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "gptj": "mlp.fc_out"}

pytestmark = pytest.mark.parametrize("family", SEVERAL)


@torch.no_grad()
def logits(model: nn.Module, **inputs: Any) -> Tensor:
    return model(token_ids(), **inputs).logits


def layers_of(model: nn.Module) -> list[FSRLLayer]:
    return [module for module in model.modules() if isinstance(module, FSRLLayer)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_several_layers(family: str, tmp_path: Path) -> None:
    saes = {0: tiny_sae(metadata={}), 2: tiny_sae("topk", metadata={}, seed=1)}
    model = fsrl_model(tiny_model(family), sae=saes, layer=[0, 2])
    first, second = layers_of(model)
    plain = tiny_model(family)
    with naively_steered(plain, first, saes[0]), naively_steered(plain, second, saes[2]):
        close(logits(model), logits(plain))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_some_features_of_low_rank(family: str, tmp_path: Path) -> None:
    some = [0, 3, 5, 11, 23]
    sae = tiny_sae()
    model = fsrl_model(tiny_model(family), sae=sae, features=some, rank=3)
    layer = only_layer(model)
    adapter = layer.fsrl_adapter["default"]
    whole = {"weight": torch.zeros(D_SAE, 16), "bias": torch.zeros(D_SAE)}
    whole["threshold"] = torch.full((D_SAE,), 1.0)
    with torch.no_grad():
        whole["weight"][some] = adapter.weight @ adapter.down
        whole["bias"][some], whole["threshold"][some] = adapter.bias, adapter.threshold
    plain = tiny_model(family)
    with naively_steered(plain, layer, sae, whole):
        close(logits(model), logits(plain))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_mixed_batches_and_a_shared_sae(family: str) -> None:
    model = fsrl_model(tiny_model(family))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The SAE was trained at layer 1")
        for name, index in (("same", 1), ("other", 2)):
            config = FSRLConfig(layer=index, sae=tiny_sae(), task_type="CAUSAL_LM")
            model.add_adapter(name, config)
    for layer in layers_of(model):
        for name in set(layer.fsrl_adapter) - {"default"}:
            randomize_adapter(layer, name, seed=len(name))
    # One copy in memory, however many adapters and layers use it.
    assert len({id(sae) for layer in layers_of(model) for sae in layer.fsrl_sae.values()}) == 1
    names = ["same", "__base__", "other", "default"]
    ids = token_ids(4)
    with torch.no_grad():
        mixed = model(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(ids[row : row + 1]).logits
            else:
                model.set_adapter(name)
                expected = model(ids[row : row + 1]).logits
            close(mixed[row : row + 1], expected)
    # On different layers, two adapters act together; on one, they are refused.
    model.base_model.set_adapter(["default", "other"])
    plain = tiny_model(family)
    one, two = layers_of(model)
    with (
        naively_steered(plain, one, tiny_sae()),
        naively_steered(plain, two, tiny_sae(), adapter_name="other"),
    ):
        close(logits(model), logits(plain))
    with pytest.raises(ValueError, match="Only one FSRL adapter can be active on a layer"):
        model.base_model.set_adapter(["default", "same"])


def test_controls(family: str) -> None:
    sae, some = tiny_sae(), [1, 4, 7]
    model = fsrl_model(tiny_model(family), sae=sae)
    base, steered = logits(tiny_model(family)), logits(model)
    layer = only_layer(model)
    adapter = layer.fsrl_adapter["default"]
    edits = {
        "only": (only_features(model, some), lambda v: only(v, some)),
        "ablated": (ablate_features(model, some), lambda v: v - only(v, some)),
        "scaled": (scale_steering(model, 0.5), lambda v: 0.5 * v),
        "top": (top_k_steering(model, 2), lambda v: only(v, v.abs().topk(2).indices)),
    }
    with torch.no_grad():
        states = tiny_model(family)(token_ids(), output_hidden_states=True).hidden_states[2]
        parameters = (adapter.weight, adapter.bias, adapter.threshold)
        _, v, _ = naive_steer(sae, states, *parameters)
        f = sae.encode(states)
        for control, edit in edits.values():
            expected = states + torch.maximum(edit(v), -f) @ sae.W_dec
            with control:
                found = model(token_ids(), output_hidden_states=True).hidden_states[2]
            close(found, expected)
    with scale_steering(model, 0):
        assert torch.equal(logits(model), base)
    # Nothing is left behind.
    assert torch.equal(logits(model), steered)


def only(v: Tensor, features: Any) -> Tensor:
    """``v`` with all but some features zeroed; the features may differ from token to token."""
    index = torch.as_tensor(features).expand(*v.shape[:-1], -1)
    return torch.zeros_like(v).scatter(-1, index, v.gather(-1, index))


def test_a_linear_layer_in_one_block(family: str) -> None:
    name = LAST_LINEAR.get(family, "mlp.down_proj")
    model = fsrl_model(
        tiny_model(family),
        target_modules=[name],
        layers_to_transform=[1],
        layers_pattern="h" if family in ("gpt2", "gptj") else "layers",
    )
    layer = only_layer(model)
    assert layer.layer_name.endswith(f"1.{name}")
    plain = tiny_model(family)
    with naively_steered(plain, layer, tiny_sae()):
        close(logits(model), logits(plain))
    excluded = fsrl_model(
        tiny_model(family), target_modules=[name], exclude_modules=[f"0.{name}", f"2.{name}"]
    )
    assert only_layer(excluded).layer_name == layer.layer_name


def test_merging_is_refused(family: str) -> None:
    model = fsrl_model(tiny_model(family))
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="depends on the input"):
            merge()
    assert torch.equal(logits(model), expected)


def test_a_module_inside_a_steered_one_is_refused(family: str) -> None:
    model = fsrl_model(tiny_model(family))
    expected, path = logits(model), only_layer(model).layer_name
    inner = FSRLConfig(target_modules=[LAST_LINEAR.get(family, "mlp.down_proj")], sae=tiny_sae())
    with pytest.raises(ValueError, match=f"lies inside '{path}', which FSRL also steers"):
        model.add_adapter("inner", inner)
    assert torch.equal(logits(model), expected)


def test_pickles(family: str) -> None:
    model = fsrl_model(tiny_model(family))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.copy(model)), logits(model))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, family: str) -> None:
    model = fsrl_model(tiny_model(family), l1_coeff=0.0).train()
    # Dropout draws anew in each pass.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if family == "gpt2":
        model.config.attn_pdrop = 0.0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(token_ids()).logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients()
    assert found.keys() == expected.keys()
    assert len(found) == 3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)
