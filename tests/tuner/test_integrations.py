"""FSRL where users meet it: life of an adapter, transformers' own methods, generation, compilers,
dtypes, devices and quantized bases, each on several architectures.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers import (
    D_IN,
    FAMILIES,
    LAYERS,
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

SEVERAL = ["llama", "gemma3", "gpt2", "gpt_neox", "gptj"]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model(token_ids() if ids is None else ids).logits


def second_config(**settings: Any) -> FSRLConfig:
    settings = {"layer": 1, "sae": tiny_sae("topk", seed=5), "init_scale": 0.3, **settings}
    return FSRLConfig(task_type="CAUSAL_LM", **settings)


# --- Life of an adapter ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", SEVERAL)
@pytest.mark.parametrize("layer", [1, 2])
def test_two_adapters_with_saes_of_their_own(family: str, layer: int) -> None:
    base = logits(tiny_model(family))
    model = fsrl_model(tiny_model(family))
    first = logits(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The SAE was trained at layer 1")
        model.add_adapter("second", second_config(layer=layer))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    alone = tiny_model(family)
    holder = next(
        m for m in model.modules() if isinstance(m, FSRLLayer) and "second" in m.fsrl_adapter
    )
    with naively_steered(alone, holder, tiny_sae("topk", seed=5), adapter_name="second"):
        torch.testing.assert_close(second, logits(alone), rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    # PEFT's own forward needs an adapter.
    assert torch.equal(logits(model.base_model.model), base)
    assert not [name for name, _ in model.named_parameters() if "fsrl_" in name]


@pytest.mark.parametrize("family", SEVERAL)
def test_status_and_parameter_counts(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = fsrl_model(tiny_model(family))
    model.add_adapter("second", second_config(activation="relu", features=[1, 2, 3]))
    # A weight row, a bias and a threshold for each of 24 features; 3 rows and biases.
    sizes = {"default": 24 * (D_IN + 2), "second": 3 * (D_IN + 1)}
    total = sum(p.numel() for p in tiny_model(family).parameters()) + sum(sizes.values())
    [layer] = model.get_layer_status()
    assert layer.module_type == "fsrl.FSRLLayer"
    assert layer.enabled
    assert layer.active_adapters == ["default"]
    assert layer.merged_adapters == []
    assert layer.available_adapters == ["default", "second"]
    assert layer.requires_grad == {"default": True, "second": False}
    status = model.get_model_status()
    assert status.peft_types == {"default": "FSRL", "second": "FSRL"}
    assert (status.trainable_params, status.total_params) == (sizes["default"], total)
    assert status.num_adapter_layers == 1
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"trainable params: {sizes['default']:,} || all params: {total:,}" in printed
    model.set_adapter("second")
    assert model.get_nb_trainable_parameters() == (sizes["second"], total)
    with model.disable_adapter():
        assert not model.get_model_status().enabled


@pytest.mark.parametrize("family", SEVERAL)
def test_modules_to_save_and_unload(family: str, tmp_path: Path) -> None:
    base = tiny_model(family)
    head = "embed_out" if family == "gpt_neox" else "lm_head"
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with warnings.catch_warnings():
        # PEFT, where the head shares its weight with the embedding.
        warnings.filterwarnings("ignore", ".*tied.*")
        model = fsrl_model(base, modules_to_save=[head])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    steered = logits(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tied.*")
        again = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.equal(logits(again), steered)
    plain = model.unload()
    assert type(plain) is type(tiny_model(family))
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert torch.equal(logits(plain), logits(tiny_model(family)))


@pytest.mark.parametrize("family", SEVERAL)
def test_unload_of_what_stands_inside_a_wrapped_layer(family: str) -> None:
    base = tiny_model(family)
    hooks = {name: len(module._forward_hooks) for name, module in base.named_modules()}
    inner = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense", "gptj": "attn.out_proj"}
    projection = inner.get(family, "self_attn.o_proj")
    sae = tiny_sae("topk", metadata={})
    mlp = FSRLConfig(target_modules=["0.mlp"], sae=sae, init_scale=0.3, task_type="CAUSAL_LM")
    model = fsrl_model(base, config=mlp)
    whole = second_config(modules_to_save=[projection])
    model.add_adapter("second", whole)
    assert torch.equal(model.unload()(token_ids()).logits, logits(tiny_model(family)))
    assert {name: len(module._forward_hooks) for name, module in base.named_modules()} == hooks


@pytest.mark.parametrize("family", list(FAMILIES))
def test_hidden_states_are_the_steered_ones(family: str) -> None:
    sae = tiny_sae()
    model, ids = fsrl_model(tiny_model(family), sae=sae), token_ids()
    layer = only_layer(model)
    adapter = layer.fsrl_adapter["default"]
    with torch.no_grad():
        x = tiny_model(family)(ids, output_hidden_states=True).hidden_states[2]
        states = model(ids, output_hidden_states=True).hidden_states
        expected, _, _ = naive_steer(sae, x, adapter.weight, adapter.bias, adapter.threshold)
    assert len(states) == LAYERS + 1
    torch.testing.assert_close(states[2], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(states[2], x, atol=1e-3)


def test_lora_under_and_over_fsrl() -> None:
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    under = get_peft_model(tiny_model(), lora).merge_and_unload()
    expected = logits(fsrl_model(under))
    torch.manual_seed(1)
    with_lora = get_peft_model(tiny_model(), lora).base_model.model
    with pytest.warns(UserWarning, match="a second time|multiple adapters in the model"):
        stacked = fsrl_model(with_lora)
    torch.testing.assert_close(logits(stacked), expected, rtol=1e-4, atol=1e-5)


# --- transformers' own methods --------------------------------------------------------------------


@pytest.mark.parametrize("family", SEVERAL)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_transformers_loads_and_saves(family: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    tiny_sae().save_model(tmp_path / "sae")
    model = fsrl_model(tiny_model(family), sae=tmp_path / "sae")
    expected = logits(model)
    model.save_pretrained(tmp_path / "peft")
    plain = tiny_model(family)
    plain.load_adapter(str(tmp_path / "peft"), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(plain), expected)
    assert not any(p.requires_grad for n, p in plain.named_parameters() if "fsrl_" in n)
    plain.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(
        tiny_model(family), tmp_path / "again", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(loaded.eval()), expected)
    plain.disable_adapters()
    assert torch.equal(logits(plain), logits(tiny_model(family)))
    plain.enable_adapters()
    plain.delete_adapter("default")
    assert torch.equal(logits(plain), logits(tiny_model(family)))


@pytest.mark.parametrize("family", SEVERAL)
def test_auto_classes(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    tiny_sae().save_model(tmp_path / "sae")
    model = fsrl_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), sae=tmp_path / "sae"
    )
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter")), expected)


def test_a_folder_within_a_folder(tmp_path: Path) -> None:
    model = fsrl_model()
    model.save_pretrained(tmp_path / "outer" / "inner")
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "outer"), subfolder="inner")
    assert torch.equal(logits(loaded.eval()), logits(model))
    plain = tiny_model()
    config = FSRLConfig.from_pretrained(tmp_path / "outer", subfolder="inner")
    plain.load_adapter(str(tmp_path / "outer" / "inner"), peft_config=config)
    assert torch.equal(logits(plain), logits(model))


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_that_are_a_pickle_run_no_code(tmp_path: Path) -> None:
    model = fsrl_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"weight": Hostile(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_several_adapters_in_one_folder(tmp_path: Path) -> None:
    model = fsrl_model()
    model.add_adapter("second", second_config())
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(loaded.eval()), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), second)


def test_a_config_that_other_methods_wrote_is_left_alone(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).r == 3


# --- Generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_left_padding_changes_no_token(family: str) -> None:
    model = fsrl_model(tiny_model(family))
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompts = [token_ids(1, length, seed=length) for length in (3, 7, 5)]
    ids = torch.zeros(3, 7, dtype=torch.long)
    mask = torch.zeros(3, 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 7 - prompt.shape[1] :] = prompt[0]
        mask[row, 7 - prompt.shape[1] :] = 1
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, 7:]
    for row, prompt in enumerate(prompts):
        ones = torch.ones_like(prompt)
        alone = model.generate(input_ids=prompt, attention_mask=ones, **settings)
        new = alone[0, prompt.shape[1] :]
        # A prompt that ends early is padded in the batch.
        assert together[row, : len(new)].tolist() == new.tolist()


@pytest.mark.parametrize("family", SEVERAL)
@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_is_that_of_the_formula(family: str, use_cache: bool) -> None:
    sae = tiny_sae()
    model, plain, ids = fsrl_model(tiny_model(family), sae=sae), tiny_model(family), token_ids()
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "num_beams": 4,
        "num_return_sequences": 2,
        "do_sample": False,
        "use_cache": use_cache,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    found = model.generate(input_ids=ids, **settings)
    with naively_steered(plain, only_layer(model), sae):
        expected = plain.generate(input_ids=ids, **settings)
    assert found.tolist() == expected.tolist()
    assert found.tolist() != plain.generate(input_ids=ids, **settings).tolist()


# --- torch.compile --------------------------------------------------------------------------------


# Raised inside torch while it traces any autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("family", "activation", "training"),
    [
        ("llama", "soft_threshold", True),
        ("gemma2", "soft_threshold", False),
        ("gpt2", "relu", True),
        ("llama", "jumprelu", False),
        ("gemma2", "jumprelu", True),
    ],
)
def test_compiled_in_one_graph(family: str, activation: str, training: bool) -> None:
    base = tiny_model(family, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = fsrl_model(base, activation=activation, jumprelu_bandwidth=0.5, l1_coeff=0.1).train(
        training
    )
    ids = token_ids()
    model(ids).logits.square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(ids).logits
    torch.testing.assert_close(out, logits(model), rtol=1e-5, atol=1e-5)
    out.square().mean().backward()
    assert len(expected) >= 2
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_compiled_sees_a_change_of_adapter() -> None:
    model = fsrl_model()
    model.add_adapter("second", second_config())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(compiled), logits(model))


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SEVERAL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_dtypes(family: str, dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    sae = tiny_sae()
    base = tiny_model(family).to(dtype)
    model = get_peft_model(
        base,
        FSRLConfig(layer=1, sae=sae, task_type="CAUSAL_LM"),
        autocast_adapter_dtype=autocast_adapter_dtype,
    ).eval()
    layer = only_layer(model)
    randomize_adapter(layer)
    adapter = layer.fsrl_adapter["default"]
    is_narrow = dtype in (torch.float16, torch.bfloat16)
    expected_dtype = torch.float32 if is_narrow and autocast_adapter_dtype else dtype
    assert {p.dtype for p in adapter.parameters()} == {expected_dtype}
    # An SAE stays in the dtype in which it is stored, unless the config says otherwise.
    assert layer.fsrl_sae["default"].dtype == torch.float32
    with torch.no_grad():
        with model.disable_adapter():
            x = model(token_ids(), output_hidden_states=True).hidden_states[2]
        states = model(token_ids(), output_hidden_states=True).hidden_states[2]
        exact = [t.detach().double() for t in (adapter.weight, adapter.bias, adapter.threshold)]
        expected, _, _ = naive_steer(tiny_sae(dtype="float32").double(), x.double(), *exact)
    assert states.dtype == dtype
    # One rounding of the result where the adapter is wide; a sum of 16 products where it is not.
    eps = torch.finfo(dtype).eps
    allowed = {True: 2, False: 20}[expected_dtype != dtype or not is_narrow]
    tolerance = max(allowed * eps, 2e-6)
    torch.testing.assert_close(states.double(), expected, rtol=tolerance, atol=2 * tolerance)


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_that_is_offloaded(family: str) -> None:
    expected = logits(fsrl_model(tiny_model(family)))
    base = accelerate.cpu_offload(tiny_model(family), execution_device=torch.device("cpu"))
    assert {p.device.type for p in base.parameters()} == {"meta"}
    model = fsrl_model(base)
    layer = only_layer(model)
    assert {p.device.type for p in layer.fsrl_adapter.parameters()} == {"cpu"}
    assert layer.fsrl_sae["default"].device.type == "cpu"
    assert torch.equal(logits(model), expected)


def test_device_map(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    expected = logits(fsrl_model())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    model = fsrl_model(base)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", device_map={"": "cpu"})
    assert torch.equal(logits(loaded), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_adapter_and_sae_land_where_the_layer_is(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    rest = {"model.layers.1": 0, "model.layers.2": 0, "model.norm": 0, "lm_head": 0}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={**places, **rest})
    model = fsrl_model(base)
    layer = only_layer(model)
    assert {p.device.type for p in layer.fsrl_adapter.parameters()} == {"cuda"}
    logits(model)
    assert layer.fsrl_sae["default"].device.type == "cuda"


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes, which this platform does not have",
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")
@pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_bases(bits: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2}
    tiny_model(**sizes).save_pretrained(tmp_path / "base")
    options = {"load_in_8bit": bits == 8, "load_in_4bit": bits == 4}

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            quantization_config=BitsAndBytesConfig(**options),
            device_map={"": "cpu"},
        ).eval()

    sae = tiny_sae(d_in=64)
    model = fsrl_model(base(), sae=sae)
    layer = only_layer(model)
    adapter, ids = layer.fsrl_adapter["default"], token_ids()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    with torch.no_grad():
        with model.disable_adapter():
            x = model(ids, output_hidden_states=True).hidden_states[2]
        found = model(ids, output_hidden_states=True).hidden_states[2]
        parameters = (adapter.weight, adapter.bias, adapter.threshold)
        expected, _, _ = naive_steer(sae, x.float(), *parameters)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, x, atol=1e-2)
    # Before it is saved: on a CPU, bitsandbytes unpacks its weights then, and rounds otherwise.
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    assert float(adapter.weight.grad.abs().sum()) > 0


# --- Copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SEVERAL)
def test_a_deep_copy_is_a_model_of_its_own(family: str) -> None:
    model = fsrl_model(tiny_model(family))
    expected = logits(model)
    duplicate = copy.deepcopy(model)
    assert only_layer(duplicate).fsrl_sae["default"] is only_layer(model).fsrl_sae["default"]
    randomize_adapter(only_layer(duplicate), seed=3)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(duplicate), expected)
