"""Where an SAE belongs in a model: decoder layers, hook points, and whether it fits there."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..sae.frozen import FrozenSAE
from ..sae.loading import parse_hook
from .config import FSRLConfig

# Names under which transformers models keep their stack of decoder layers.
_DECODER_STACKS = frozenset({"layers", "h", "blocks", "block"})
# Names under which their decoder layers keep what writes to the residual stream. Where a norm
# follows before the sum (Gemma 2 and 3), TransformerLens's hook is behind that norm.
_WRITERS = {
    "mlp_out": ("post_feedforward_layernorm", "mlp", "feed_forward"),
    "attn_out": ("self_attn", "attn", "attention", "self_attention"),
}
# Names of the attention's output projection, which reads all heads side by side.
_HEAD_READERS = ("o_proj", "c_proj", "out_proj", "dense")
_NORM_AFTER_ATTENTION = "post_attention_layernorm"


def resolve_targets(
    config: FSRLConfig, saes: Mapping[str, FrozenSAE], model: nn.Module
) -> dict[str, FrozenSAE]:
    """The module path that each SAE of a config steers; sets ``config.layer`` where it was open.

    Args:
        config: without ``target_modules``.
        saes: by layer as a string, or one under ``""``.
        model: the base model.

    Raises:
        ValueError: a layer that does not exist, decoder layers that cannot be found, an SAE of
            another width, or no way to tell where the SAE belongs.
    """
    if not config.layers:
        hook = parse_hook(saes[""].info.hook_name)
        if hook is None:
            raise ValueError(
                "FSRLConfig needs `layer` (or `target_modules`): the SAE's hook name "
                f"{saes[''].info.hook_name!r} does not say at which module it was trained."
            )
        config.layer = hook.layer
    paths = {}
    for layer in config.layers:
        sae = saes[str(layer) if str(layer) in saes else ""]
        path = _layer_path(model, layer)
        hook = parse_hook(sae.info.hook_name)
        if hook is None and sae.info.hook_name is not None:
            raise ValueError(
                f"The SAE was trained at hook {sae.info.hook_name!r}, which is not a place that "
                f"`layer` can name: the output of a decoder layer, of its attention or its MLP, or "
                "the heads that the attention's output projection reads. Use another SAE, or name "
                "the module whose output it reads with `target_modules`."
            )
        if hook is not None and hook.layer != layer:
            warnings.warn(
                f"The SAE was trained at layer {hook.layer} (hook {sae.info.hook_name!r}), but "
                f"layer={layer} will be steered. Its features may mean nothing there. Use "
                f"layer={hook.layer}, or an SAE for layer {layer}.",
                stacklevel=2,
            )
        if hook is not None and hook.place != "resid_post":
            path = writer_path(model, path, hook.place)
        paths[path] = sae
        if not reads_heads(sae):
            check_hidden_size(sae, model)
    return paths


def reads_heads(sae: FrozenSAE) -> bool:
    """Whether an SAE was trained on what the attention's output projection reads."""
    hook = parse_hook(sae.info.hook_name)
    return hook is not None and hook.place == "z"


def _layer_path(model: nn.Module, layer: int) -> str:
    paths = decoder_layers(model)
    if layer not in paths:
        raise ValueError(
            f"Layer {layer} does not exist: {type(model).__name__} has {len(paths)} decoder "
            f"layers, 0 to {len(paths) - 1}."
        )
    return paths[layer]


def decoder_layers(model: nn.Module) -> dict[int, str]:
    """Map the index of each decoder layer to the path of its module.

    The stack is the ``nn.ModuleList`` with as many entries as the text config has hidden layers,
    inside the model's decoder where transformers can name it, so that the vision tower of a
    multimodal model is not taken for it.

    Raises:
        ValueError: if there is no such stack, or more than one.
    """
    root, decoder = _decoder_root(model)
    expected = _text_config(model).get("num_hidden_layers")
    stacks = {
        f"{root}.{name}".strip("."): module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.rpartition(".")[2] in _DECODER_STACKS
        and (expected is None or len(module) == expected)
    }
    outermost = {
        path: module
        for path, module in stacks.items()
        if not any(path.startswith(other + ".") for other in stacks)
    }
    if len(outermost) != 1:
        found = f"found several: {sorted(outermost)}" if outermost else "found none"
        raise ValueError(
            f"Cannot tell which modules of {type(model).__name__} are its decoder layers: expected "
            f"one list named {' or '.join(sorted(_DECODER_STACKS))} with {expected or 'some'} "
            f"entries, {found}. Name the module to steer with "
            "`target_modules=['path.to.the.layer']` instead of `layer`; "
            "`[name for name, _ in model.named_modules()]` lists the paths."
        )
    [(path, stack)] = outermost.items()
    return {index: f"{path}.{index}" for index in range(len(stack))}


def _decoder_root(model: nn.Module) -> tuple[str, nn.Module]:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if isinstance(decoder, nn.Module):
        for name, module in model.named_modules():
            if module is decoder:
                return name, module
    return "", model


def _text_config(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "config", None)
    if config is None:
        return {}
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    if isinstance(config, Mapping):
        return config
    # Attribute access, not to_dict(): transformers maps n_layer, n_embd, ... to the common names.
    names = ("num_hidden_layers", "hidden_size")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def writer_path(model: nn.Module, layer_path: str, place: str) -> str:
    """Path of the module inside a decoder layer that stands at a hook point.

    Args:
        model: the base model.
        layer_path: path of the decoder layer.
        place: ``"attn_out"``, ``"mlp_out"`` or ``"z"``; see ``HookPoint``.

    Raises:
        ValueError: if no module there has a name that transformers uses for it.
    """
    layer = model.get_submodule(layer_path)
    if place == "z":
        attention = _child_path(layer, layer_path, _WRITERS["attn_out"])
        return _child_path(model.get_submodule(attention), attention, _HEAD_READERS)
    names = _WRITERS[place]
    if place == "attn_out" and hasattr(layer, "post_feedforward_layernorm"):
        names = (_NORM_AFTER_ATTENTION, *names)
    return _child_path(layer, layer_path, names)


def _child_path(module: nn.Module, path: str, names: tuple[str, ...]) -> str:
    for name in names:
        if isinstance(getattr(module, name, None), nn.Module):
            return f"{path}.{name}"
    raise ValueError(
        f"Cannot find the module to steer in {path}: expected one named {' or '.join(names)}, "
        f"found {[name for name, _ in module.named_children()]}. Name it with `target_modules`."
    )


def check_hidden_size(sae: FrozenSAE, model: nn.Module) -> None:
    """Refuse an SAE of another width.

    Raises:
        ValueError: if the model's hidden size is not what the SAE reads.
    """
    hidden_size = _text_config(model).get("hidden_size")
    if hidden_size is not None and hidden_size != sae.info.d_in:
        raise ValueError(
            f"The SAE reads activations of width {sae.info.d_in}, but {type(model).__name__} has "
            f"hidden size {hidden_size}. Use an SAE that was trained on this model "
            f"(this one: {sae.info.model_name or 'unknown model'}, {sae.info.hook_name})."
        )


def warn_of_other_model(sae: FrozenSAE, model: nn.Module) -> None:
    """Warn where an SAE seems to belong to another model than the base model."""
    trained_on, name = sae.info.model_name, getattr(model, "name_or_path", None)
    # The name of a local folder says nothing about the model in it.
    if not trained_on or not name or os.path.isdir(name):
        return
    left, right = (
        re.split(r"[\\/]", part.rstrip("/\\"))[-1].lower() for part in (trained_on, name)
    )
    if left not in right and right not in left:
        warnings.warn(
            f"The SAE was trained on {trained_on!r}, but the base model is {name!r}. Features of "
            "another model's SAE may mean nothing here. Ignore this if one is a fine-tuned version "
            "of the other.",
            stacklevel=2,
        )
