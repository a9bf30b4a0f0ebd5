"""Nothing is differentiated below the lowest adapter, and no gradient changes by that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from trl.experimental.cpo import CPOConfig, CPOTrainer

from helpers import (
    D_IN,
    fsrl_model,
    randomize_adapter,
    tiny_model,
    tiny_preferences,
    tiny_sae,
    tiny_tokenizer,
    token_ids,
)
from peft_fsrl import FSRLConfig, FSRLLayer, with_fsrl
from peft_fsrl.steering import ForwardRecord, SteeringMonitor
from peft_fsrl.training.penalty import SparsityPenalty
from peft_fsrl.training.prefix import without_prefix_graph
from peft_fsrl.tuner.placement import decoder_layers

# transformers 5.23 renamed them.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
MODES = ("plain", "checkpoint")

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def build(family: str = "llama", layers: Any = 1, mode: str = "plain") -> PeftModel:
    """A model as TRL leaves it: embeddings that require gradients."""
    sae: Any = tiny_sae(metadata={}, dtype="float64")
    if isinstance(layers, list):
        sae = dict.fromkeys(layers, sae)
    base = tiny_model(family, **(NO_DROPOUT if family == "gpt2" else {})).double()
    model = fsrl_model(base, layer=layers, sae=sae, l1_coeff=0.7)
    if mode == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def inputs_with_graph(model: PeftModel) -> list[bool]:
    """Filled in, at each pass, with whether the input of each decoder layer has a graph."""
    inner, found = model.get_base_model(), []
    for path in decoder_layers(inner).values():

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0].requires_grad)

        inner.get_submodule(path).register_forward_pre_hook(look)
    return found


def gradients(model: PeftModel, cut: bool, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    records: list[ForwardRecord] = []
    inputs = inputs or {"input_ids": token_ids(2, 5)}
    with SteeringMonitor(model, records.append):
        if cut:
            with without_prefix_graph(model):
                logits = model(**inputs, use_cache=False).logits
        else:
            logits = model(**inputs, use_cache=False).logits
        penalty = SparsityPenalty(model)(records[0])
        (logits.square().mean() + penalty).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gptj"])
def test_the_prefix_has_no_graph_and_gradients_are_the_same(family: str, mode: str) -> None:
    expected = gradients(build(family, mode=mode), cut=False)
    model = build(family, mode=mode)
    graphs = inputs_with_graph(model)
    assert_equal(gradients(model, cut=True), expected)
    assert graphs[:3] == [True, False, True], "the first look comes before the cut"
    assert not any(graphs[3:]), "and nothing below is recomputed"


@pytest.mark.parametrize("mode", MODES)
def test_two_adapters_both_get_their_gradient(mode: str) -> None:
    expected = gradients(build(layers=[0, 2], mode=mode), cut=False)
    assert sum("layers.0" in name for name in expected) == 3
    assert_equal(gradients(build(layers=[0, 2], mode=mode), cut=True), expected)


def test_the_block_leaves_nothing_behind() -> None:
    model = build(mode="checkpoint")
    with without_prefix_graph(model) as active:
        assert active
    graphs = inputs_with_graph(model)
    model(token_ids(), use_cache=False)
    assert graphs == [True, True, True]


def train_embeddings(model: PeftModel) -> None:
    model.get_input_embeddings().requires_grad_(True)


def train_a_norm_below(model: PeftModel) -> None:
    model.get_base_model().model.layers[0].input_layernorm.requires_grad_(True)


def train_inside_the_steered_layer(model: PeftModel) -> None:
    [layer] = [module for module in model.modules() if isinstance(module, FSRLLayer)]
    layer.base_layer.mlp.requires_grad_(True)


@pytest.mark.parametrize(
    "change", [train_embeddings, train_a_norm_below, train_inside_the_steered_layer]
)
@pytest.mark.parametrize("mode", MODES)
def test_what_trains_below_keeps_its_gradient(change: Any, mode: str) -> None:
    results = []
    for cut in (False, True):
        model = build(mode=mode)
        change(model)
        with without_prefix_graph(model) as active:
            assert not active
        results.append(gradients(model, cut))
    assert len(results[0]) > 3
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("mode", MODES)
def test_given_embeddings_keep_their_gradient(mode: str) -> None:
    found = []
    for cut in (False, True):
        embeddings = torch.randn(2, 5, D_IN, dtype=torch.float64, generator=torch.manual_seed(1))
        embeddings.requires_grad_(True)
        gradients(build(mode=mode), cut, inputs_embeds=embeddings)
        found.append(embeddings.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


# PEFT, at the second of two methods on one model.
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_lora_below_trains_with_the_adapter_above() -> None:
    """LoRA first and FSRL on top."""
    inner = get_peft_model(tiny_model().double(), LoraConfig(target_modules=["q_proj"]))
    model = get_peft_model(
        inner.base_model.model, FSRLConfig(layer=1, sae=tiny_sae(dtype="float64"), l1_coeff=0.7)
    ).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            nn.init.normal_(parameter, std=0.1)
    for layer in (m for m in model.modules() if isinstance(m, FSRLLayer)):
        randomize_adapter(layer)
    expected = gradients(model, cut=False)
    assert any("layers.0" in n and "lora_A" in n for n in expected)
    assert_equal(gradients(model, cut=True), expected)


def test_trainers_do_it(tmp_path: Path) -> None:
    """Three steps with checkpointing, whose prefix is cut, are those without any."""
    settings = {
        **{"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 10.0, "simpo_gamma": 5.0},
        **{"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 2},
        **{"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"},
        **{"disable_tqdm": True, "dataloader_pin_memory": False},
    }
    found = []
    modes = {"off": {}, "on": {"gradient_checkpointing": True}}
    # A reentrant checkpoint has no use for inputs that need no gradient, and nothing is cut there.
    modes["reentrant"] = {**modes["on"], "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    for mode, checkpointing in modes.items():
        model = fsrl_model(tiny_model().double(), sae=tiny_sae(dtype="float64"), l1_coeff=0.7)
        trainer = with_fsrl(CPOTrainer)(
            model,
            args=CPOConfig(
                str(tmp_path), **{"gradient_checkpointing": False, **checkpointing}, **settings
            ),
            train_dataset=tiny_preferences(6),
            processing_class=tiny_tokenizer(),
        )
        graphs = inputs_with_graph(model)
        trainer.train()
        assert graphs.count(True) == {"off": 3, "on": 6, "reentrant": 9}[mode]
        found.append({n: p.detach() for n, p in model.named_parameters() if "fsrl" in n})
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])
