"""Tiny local stand-ins for what PEFT's tests fetch from the Hub, and SAEs of any width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from transformers import PretrainedConfig

WIDTH = 16
LAYERS = 3

_TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# A spread of weights at which what is generated depends on what is steered: tests compare texts.
_SPREAD = {"initializer_range": 0.2}
_COMMON = {
    **_TOKENS,
    **_SPREAD,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 1, "head_dim": 8}
_GPT = {**_TOKENS, **_SPREAD, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}

# Named without the words by which PEFT's tests recognize models whose layers other methods cannot
# wrap ("gpt2", "GPT2LMHeadModel"): FSRL wraps whole decoder layers, whatever they consist of.
DECODERS: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny-llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "tiny-gemma-2": lambda: transformers.Gemma2Config(**_GROUPED, sliding_window=4),
    "tiny-gemma-3": lambda: transformers.Gemma3TextConfig(**_GROUPED, sliding_window=4),
    "tiny-qwen-2": lambda: transformers.Qwen2Config(**_COMMON, num_key_value_heads=1),
    "tiny-qwen-3": lambda: transformers.Qwen3Config(**_GROUPED),
    "tiny-mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=4),
    "tiny-phi": lambda: transformers.PhiConfig(**_COMMON),
    "tiny-opt": lambda: transformers.OPTConfig(
        **{**_COMMON, "ffn_dim": 32, "word_embed_proj_dim": WIDTH}
    ),
    "tiny-gpt-2": lambda: transformers.GPT2Config(**_GPT),
    "tiny-gpt-j": lambda: transformers.GPTJConfig(**_GPT, rotary_dim=4),
    "tiny-gpt-neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
}
ENCODERS: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny-bert": lambda: transformers.BertConfig(**_COMMON),
    "tiny-roberta": lambda: transformers.RobertaConfig(**_COMMON),
    "tiny-deberta-v2": lambda: transformers.DebertaV2Config(**_COMMON),
}
ENCODER_DECODERS: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny-t5": lambda: transformers.T5Config(
        **_TOKENS,
        d_model=WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=LAYERS,
        num_heads=2,
        decoder_start_token_id=0,
    ),
    "tiny-bart": lambda: transformers.BartConfig(
        **_TOKENS,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    ),
}
CLASSIFIERS = ("tiny-bert-classifier", "tiny-roberta-classifier", "tiny-llama-classifier")
LORA_ADAPTER = "tiny-lora-adapter"
SAE_FOLDER = "tiny-sae"

_SAE_SETTINGS: dict[str, dict[str, Any]] = {"topk": {"k": 6}}


def tiny_sae(
    width: int = WIDTH, architecture: str = "standard", normalization: str = "none"
) -> SAE[Any]:
    """A random SAE of ``width`` inputs and half as many features again, the same every time."""
    cls, config_class = SAE_CLASS_REGISTRY[architecture]
    config = config_class(
        d_in=width,
        d_sae=width + width // 2,
        normalize_activations=normalization,
        **_SAE_SETTINGS.get(architecture, {}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = cls(config)
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.normal_(std=0.3)
                if name == "threshold":
                    parameter.abs_()
    return sae


def write_all(folder: Path) -> None:
    """Write every stand-in into ``folder`` under its name.

    PEFT's tests name models by their Hub id: run in this folder, they take these names for paths.
    """
    _write(folder, DECODERS, transformers.AutoModelForCausalLM)
    _write(folder, ENCODERS, transformers.AutoModel)
    _write(folder, ENCODER_DECODERS, transformers.AutoModelForSeq2SeqLM)
    families = {**ENCODERS, **DECODERS}
    classifiers = {name: families[name.removesuffix("-classifier")] for name in CLASSIFIERS}
    _write(folder, classifiers, transformers.AutoModelForSequenceClassification)
    LoraConfig(base_model_name_or_path="tiny-llama", target_modules=["q_proj"]).save_pretrained(
        str(folder / LORA_ADAPTER)
    )
    tiny_sae().save_model(folder / SAE_FOLDER)


def _write(folder: Path, families: dict[str, Callable[[], PretrainedConfig]], auto: Any) -> None:
    for name, config in families.items():
        torch.manual_seed(0)
        model = auto.from_config(config())
        if model.can_generate():
            # Some tests set no length, and a random model seldom ends by itself.
            model.generation_config.max_length = 20
        model.save_pretrained(folder / name)
