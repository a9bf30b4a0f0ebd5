"""Builders of tiny models, SAEs and data, and the method's formula written out naively."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from sae_lens import SAE, Transcoder
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from peft_fsrl import FSRLConfig, FSRLLayer, freeze_sae

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
D_IN = 16
D_SAE = 24
VOCABULARY = 40
LAYERS = 3
HOOK_NAME = "blocks.1.hook_resid_post"
# Of a trainer that trains on a CPU and writes nothing.
TRAINING: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
# SGD without clipping: a parameter's change is its gradient times the learning rate.
DESCENT: dict[str, Any] = {**TRAINING, "optim": "sgd", "max_grad_norm": 0.0}
SIMPO: dict[str, Any] = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 10.0, "simpo_gamma": 5.0}

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE = {
    **_TOKENS,
    "hidden_size": D_IN,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_NO_HEAD_DIM = {key: value for key, value in _LLAMA_LIKE.items() if key != "head_dim"}
_GPT_LIKE = {**_TOKENS, "n_embd": D_IN, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_LLAMA_LIKE),
    "gemma2": lambda: Gemma2Config(**_LLAMA_LIKE, sliding_window=4),
    "gemma3": lambda: Gemma3TextConfig(**_LLAMA_LIKE, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**_NO_HEAD_DIM),
    "qwen3": lambda: Qwen3Config(**_LLAMA_LIKE),
    "mistral": lambda: MistralConfig(**_LLAMA_LIKE, sliding_window=4),
    "phi": lambda: PhiConfig(**_NO_HEAD_DIM),
    "gpt2": lambda: GPT2Config(**_GPT_LIKE),
    "gpt_neox": lambda: GPTNeoXConfig(
        **{k: v for k, v in _NO_HEAD_DIM.items() if k != "num_key_value_heads"}
    ),
    # The only family whose decoder layers return tuples in every supported transformers.
    "gptj": lambda: GPTJConfig(**_GPT_LIKE, rotary_dim=4),
}

_EXPERTS = {"num_experts_per_tok": 2}
_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
_VISION = {**_LLAMA_LIKE, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
# Experts, linear attention, attention in chunks, a tower beside the language model: each attaches
# and steers like the others, so only tests/tuner/test_newer_architectures.py runs them all.
NEWER: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma3_multimodal": lambda: Gemma3Config(
        text_config={**_LLAMA_LIKE, "sliding_window": 4},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=39,
        boi_token_index=38,
        eoi_token_index=37,
    ),
    "gemma4": lambda: Gemma4TextConfig(
        **_LLAMA_LIKE,
        sliding_window=4,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        global_head_dim=8,
    ),
    "qwen3_5": lambda: Qwen3_5TextConfig(
        **_LLAMA_LIKE,
        **_HEADS,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_LLAMA_LIKE, **_EXPERTS, num_experts=4, moe_intermediate_size=8
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_LLAMA_LIKE, **_EXPERTS, num_local_experts=4, sliding_window=4
    ),
    "olmo3": lambda: Olmo3Config(**_NO_HEAD_DIM, sliding_window=4),
    "llama4": lambda: Llama4TextConfig(
        **_LLAMA_LIKE, num_local_experts=2, intermediate_size_mlp=32, attention_chunk_size=32
    ),
}

NORMALISATIONS = (
    "none",
    "expected_average_only_in",
    "constant_norm_rescale",
    "layer_norm",
    "covariance_whitening",
    "constant_scalar_rescale",
)
_SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": 6},
    "abstopk": {"k": 6},
    "matching_pursuit": {"max_iterations": 6},
    "temporal": {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 6},
}
# Every architecture that SAELens loads for inference, except what `freeze_sae` refuses. One that is
# new in SAELens fails for want of settings above.
ARCHITECTURES = tuple(
    name for name, (cls, _) in SAE_CLASS_REGISTRY.items() if not issubclass(cls, Transcoder)
)
TRANSCODERS = tuple(
    name for name, (cls, _) in SAE_CLASS_REGISTRY.items() if issubclass(cls, Transcoder)
)
# Settings that change what encode or decode computes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk-decoder-norm": ("topk", {"rescale_acts_by_decoder_norm": True}),
    "abstopk-decoder-norm": ("abstopk", {"rescale_acts_by_decoder_norm": True}),
    "standard-raw-input": ("standard", {"apply_b_dec_to_input": False}),
    "matching-pursuit-raw-input": ("matching_pursuit", {"apply_b_dec_to_input": False}),
    "temporal-untied-relu": ("temporal", {"tied_weights": False, "sae_diff_type": "relu"}),
    "temporal-tied-raw-input": ("temporal", {"apply_b_dec_to_input": False}),
}


def load_example(name: str) -> ModuleType:
    """A script of examples/ as a module, registered: dataclasses look theirs up by name."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def tiny_model(family: str = "llama", seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random causal LM of three layers and width 16, the same for the same seed."""
    config = (FAMILIES | NEWER)[family]()
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def accepts(architecture: str, normalization: str) -> bool:
    """Whether SAELens lets an architecture have this normalization."""
    config_class = SAE_CLASS_REGISTRY[architecture][1]
    try:
        config_class(d_in=D_IN, d_sae=D_SAE, normalize_activations=normalization)
    except ValueError:
        return False
    return True


SAE_CASES = tuple((a, n) for a in ARCHITECTURES for n in NORMALISATIONS if accepts(a, n))


def fits(architecture: str, activation: str, rank: int | None = None) -> bool:
    """Whether an adapter of this activation and rank can steer an SAE of this architecture."""
    featurewise = architecture in {"standard", "gated", "jumprelu"}
    return activation != "gain" or (featurewise and rank is None)


def tiny_sae(
    architecture: str = "standard",
    normalization: str = "none",
    *,
    dtype: str = "float32",
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    **settings: Any,
) -> SAE[Any]:
    """A SAELens SAE in which no tensor is zero: biases, gates and thresholds are random too."""
    cls, config_class = SAE_CLASS_REGISTRY[architecture]
    settings = {**_SETTINGS[architecture], **settings}
    if normalization == "constant_scalar_rescale":
        settings.setdefault("activation_normalization_factor", 0.7)
    sizes = {"d_in": D_IN, "d_sae": D_SAE} | settings
    metadata = {"hook_name": HOOK_NAME} if metadata is None else metadata
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = cls(
            config_class(
                **sizes,
                dtype=dtype,
                normalize_activations=normalization,
                metadata=SAEMetadata(**metadata),
            )
        )
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.normal_(std=0.3)
                if name == "threshold":
                    parameter.abs_()
    return sae


def tiny_transcoder(architecture: str) -> SAE[Any]:
    """A SAELens transcoder, which is not an SAE for our purposes."""
    cls, config_class = SAE_CLASS_REGISTRY[architecture]
    config = config_class(d_in=D_IN, d_sae=D_SAE, d_out=D_IN, apply_b_dec_to_input=False)
    return cls(config)


def fsrl_model(
    model: nn.Module | None = None, config: FSRLConfig | None = None, **settings: Any
) -> PeftModel:
    """A tiny model with an adapter that steers visibly: half of its thresholds are crossed."""
    if config is None:
        settings.setdefault("sae", tiny_sae())
        settings.setdefault("layer", None if "target_modules" in settings else 1)
        settings.setdefault("task_type", "CAUSAL_LM")
        config = FSRLConfig(**settings)
    steered = get_peft_model(tiny_model() if model is None else model, config)
    for name, layer in steered.base_model.named_modules():
        if isinstance(layer, FSRLLayer):
            randomize_adapter(layer, seed=len(name))
    return steered.eval()


def randomize_adapter(layer: FSRLLayer, adapter_name: str = "default", seed: int = 0) -> None:
    """Give weight, bias and threshold values at which every branch of the method is taken."""
    adapter = layer.fsrl_adapter[adapter_name]
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: nn.Parameter, scale: float) -> Tensor:
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return (values * scale).to(parameter)

    with torch.no_grad():
        adapter.weight.copy_(draw(adapter.weight, 0.3))
        adapter.bias.copy_(draw(adapter.bias, 0.3))
        if adapter.activation == "soft_threshold":
            adapter.threshold.copy_(draw(adapter.threshold, 0.3).abs())
        elif adapter.activation == "jumprelu":
            adapter.log_threshold.copy_(draw(adapter.log_threshold, 0.3) - 1.0)
        elif adapter.activation == "gain":
            adapter.gain.copy_(draw(adapter.gain, 1.0))


def only_layer(model: nn.Module) -> FSRLLayer:
    """The one steering layer of a model."""
    [layer] = [module for module in model.modules() if isinstance(module, FSRLLayer)]
    return layer


def bare_layer(
    sae: SAE[Any], dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any
) -> FSRLLayer:
    """A steering layer around the identity, so that its input is the wrapped module's output."""
    settings.setdefault("l1_coeff", 0.0)
    layer = FSRLLayer(nn.Identity(), "identity")
    layer.update_layer("default", FSRLConfig(layer=0, sae=sae, **settings), freeze_sae(sae))
    layer.to(dtype)
    randomize_adapter(layer, seed=seed)
    return layer


class _NaiveJump(torch.autograd.Function):
    """``u+ 1[u+ > theta]`` and ``1[u+ > theta]``, with the estimator's gradient written by hand."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, log_theta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u, log_theta)
        ctx.eps = eps
        is_open = u.relu() > log_theta.exp()
        return u * is_open, is_open.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_gate: Tensor) -> tuple[Tensor, Tensor, None]:
        u, log_theta = ctx.saved_tensors
        theta = log_theta.exp()
        z = (u.relu() - theta) / ctx.eps
        kernel = ((z > -0.5) & (z < 0.5)).to(u.dtype)
        d_theta = -(theta / ctx.eps) * kernel * g - (1 / ctx.eps) * kernel * g_gate
        d_log_theta = (d_theta * theta).reshape(-1, theta.numel()).sum(dim=0)
        return g * (u.relu() > theta), d_log_theta, None


def naive_vector(
    u: Tensor, threshold: Tensor | None, activation: str, bandwidth: float
) -> tuple[Tensor, Tensor | None]:
    """``act_theta(u)``, and the gate of ``jumprelu``, from the definitions."""
    if activation == "relu":
        return torch.where(u > 0, u, 0.0), None
    assert threshold is not None
    if activation == "gain":
        return torch.where(u > 0, threshold * u, 0.0), None
    if activation == "jumprelu":
        return _NaiveJump.apply(u, threshold, bandwidth)
    above = torch.where(u > threshold, u - threshold, 0.0)
    below = torch.where(u < -threshold, u + threshold, 0.0)
    return above + below, None


def naive_steer(
    sae: SAE[Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    threshold: Tensor | None,
    activation: str = "soft_threshold",
    bandwidth: float = 1e-2,
    non_negative: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x + decode(relu(f + v)) - decode(f)`` by SAELens's own encode and decode; ``v``; the gate.

    With the signed features of ``abstopk`` nothing is clamped, or ``v = 0`` would change ``x``.
    """
    u = sae.process_sae_in(x) @ weight.T + bias
    v, gate = naive_vector(u, threshold, activation, bandwidth)
    f = sae.encode(x)
    # Some normalizations keep a state from each encode that the next decode uses up.
    reconstruction = sae.decode(f)
    sae.encode(x)
    steered = f + v
    if non_negative and sae.cfg.architecture() != "abstopk":
        # At a tie the slope from the right: v is about to grow where a jump's kernel reaches it.
        steered = torch.where(steered >= 0, steered, 0.0)
    return x + sae.decode(steered) - reconstruction, v, gate


@contextmanager
def naively_steered(
    model: PreTrainedModel,
    layer: FSRLLayer,
    sae: SAE[Any],
    parameters: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
) -> Iterator[list[tuple[Tensor, Tensor, Tensor | None]]]:
    """Steer a plain model by ``naive_steer`` as ``layer`` would; collects what it returned.

    Args:
        model: a model without adapters; the module at ``layer.layer_name`` is hooked.
        layer: gives the place, the activation and, by default, the parameters.
        sae: the SAE as SAELens made it.
        parameters: weight, bias and threshold or gain to use instead, by name.
        adapter_name: which of the layer's adapters.
    """
    adapter = layer.fsrl_adapter[adapter_name]
    own = {**dict(adapter.named_buffers()), **dict(adapter.named_parameters())}
    values = {**own, **(parameters or {})}
    threshold = values.get("threshold", values.get("log_threshold", values.get("gain")))
    results = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        result = naive_steer(
            sae,
            x,
            values["weight"],
            values["bias"],
            threshold,
            adapter.activation,
            adapter.bandwidth,
        )
        results.append(result)
        return result[0] if isinstance(output, Tensor) else (result[0], *output[1:])

    handle = model.get_submodule(layer.layer_name).register_forward_hook(hook)
    try:
        yield results
    finally:
        handle.remove()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w3`` to ``w39``, and the three special tokens of the tiny models."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_preferences(rows: int = 4, seed: int = 0) -> Dataset:
    """Preference pairs of unequal lengths, so that every batch of more than one is padded."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> str:
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        return " ".join(f"w{token}" for token in tokens.tolist())

    return Dataset.from_list(
        [
            {
                "prompt": text(2 + row % 3),
                "chosen": " " + text(3 + 2 * (row % 4)),
                "rejected": " " + text(7 - row % 4),
            }
            for row in range(rows)
        ]
    )


def token_ids(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Random ordinary tokens, shape ``(batch, length)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)
