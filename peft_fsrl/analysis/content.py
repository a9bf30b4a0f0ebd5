"""SHA-256 of the inputs of results, which decide whether a stored result is reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..steering import adapter_configs, base_model, fsrl_layers

# Of an adapter's config, what says where things lie and not what they are.
_PLACES = ("base_model_name_or_path", "inference_mode", "revision", "sae", "peft_version")
_ROWS = 2**12


def digest_json(value: Any) -> str:
    """Of something that JSON can hold; sets count as sorted lists, other things as their text."""
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of tensors: name, dtype, shape and all bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda each: each[0]):
        data = tensor.detach()
        digest.update(f"{name}:{data.dtype}:{tuple(data.shape)};".encode())
        # In parts, for what is not contiguous or on another device has to be copied.
        for part in (data if data.ndim else data.reshape(1)).split(_ROWS):
            digest.update(part.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_tokenizer(tokenizer: Any) -> str:
    """Of what decides which tokens a text has: the whole tokenizer, or its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        described = json.loads(backend.to_str())
        # Left behind by whoever called it last.
        described.pop("truncation", None)
        described.pop("padding", None)
    template = getattr(tokenizer, "chat_template", None)
    return digest_json([described, tokenizer.special_tokens_map, template])


def digest_adapter(model: nn.Module) -> str:
    """Of what was trained: tensors, settings, SAE and its dtype, and ``modules_to_save``.

    Adapters that are not active count too: a result is then made again without need, not kept
    without right.
    """
    saes = {
        path: {
            name: [sae.info.fingerprint, str(sae.dtype), sae.feature_index.tolist()]
            for name, sae in layer.fsrl_sae.items()
        }
        for path, layer in fsrl_layers(model).items()
    }
    active = {path: layer.active_adapters for path, layer in fsrl_layers(model).items()}
    configs = {
        name: {key: value for key, value in config.to_dict().items() if key not in _PLACES}
        for name, config in adapter_configs(model).items()
    }
    return digest_json([saes, active, configs, digest_tensors(_tensors(model, trained=True))])


def digest_base(model: nn.Module) -> str:
    """Of what it was trained on: all other tensors, and the settings of the model.

    Some of them (an epsilon, rotary embeddings, how answers are sampled) are in no tensor.
    """
    inner: Any = base_model(model)
    settings = []
    for config in (inner.config, getattr(inner, "generation_config", None)):
        described = config.to_dict() if config is not None else {}
        described.pop("_name_or_path", None)
        described.pop("transformers_version", None)
        settings.append(described)
    return digest_json([settings, digest_tensors(_tensors(model, trained=False))])


def _tensors(model: nn.Module, trained: bool) -> Iterable[tuple[str, Tensor]]:
    inner = base_model(model)
    copies = tuple(
        f"{path}.modules_to_save."
        for path, module in inner.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    )
    for name, tensor in inner.state_dict().items():
        if isinstance(tensor, Tensor):
            own = ".fsrl_adapter." in name or name.startswith(copies or ("\0",))
            if own == trained:
                yield name, tensor


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
