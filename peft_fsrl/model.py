"""``FSRLModel``: finds what to steer, loads the SAE once, and puts an ``FSRLLayer`` there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import skip_init_on_device
from torch import nn

from .config import FSRLConfig
from .layer import FSRLLayer, merge_refusal
from .sae import FrozenSAE
from .sae_sources import freeze_sae, load_sae, parse_hook_layer

# Names under which transformers models keep their stack of decoder layers.
_DECODER_STACKS = frozenset({"layers", "h", "blocks", "block"})
_CACHE_GUARD = "_fsrl_cache_guard"


class FSRLModel(BaseTuner):
    """Feature-steering adapters on a base model.

    Made by ``get_peft_model(model, FSRLConfig(...))``; see ``FSRLConfig`` for the options and
    ``FSRLLayer`` for the mathematics.

    Args:
        model: the model to adapt. It stays frozen.
        config: an ``FSRLConfig``, or a mapping from adapter name to one.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's weights on ``meta``, to be filled by loading.

    Raises:
        ValueError: a layer that does not exist, decoder layers that cannot be found, an SAE of
            another width, an SAE that changed since the adapter was saved.
    """

    prefix: str = "fsrl_"
    tuner_layer_cls = FSRLLayer
    # PEFT looks target modules up by model type; here `layer` names them.
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _sae_to_inject: FrozenSAE | None = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Add an adapter; see ``peft.tuners.tuners_utils.BaseTuner.inject_adapter``."""
        try:
            super().inject_adapter(model, adapter_name, **kwargs)
        finally:
            # From here on only the layers hold the SAE: a copy that none of them uses is freed.
            self._sae_to_inject = None

    def _prepare_adapter_config(
        self, peft_config: FSRLConfig, model_config: dict[str, Any]
    ) -> FSRLConfig:
        return peft_config

    def _prepare_model(self, peft_config: FSRLConfig, model: nn.Module) -> None:
        """Load the SAE and settle every question about the target before anything is changed."""
        # Under `low_cpu_mem_usage=True` PEFT sends new parameters to `meta`: not those of the SAE.
        sae: FrozenSAE = skip_init_on_device(_load_bound_sae)(peft_config)
        _warn_of_other_model(sae, model)
        if peft_config.target_modules is None:
            peft_config._layer_path = _resolve_layer(peft_config, sae, model)
            _check_hidden_size(sae, model)
        self._sae_to_inject = sae
        _guard_cache(sae, model)

    @staticmethod
    def _check_target_module_exists(peft_config: FSRLConfig, key: str) -> Any:
        path = getattr(peft_config, "_layer_path", None)
        if path is not None:
            return key == path
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: FSRLConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        sae = self._sae_to_inject
        assert sae is not None
        if isinstance(target, FSRLLayer):
            target.update_layer(adapter_name, peft_config, sae)
            layer = target
        else:
            layer = FSRLLayer(target, current_key)
            layer.update_layer(adapter_name, peft_config, sae)
            setattr(parent, target_name, layer)
        if adapter_name not in self.active_adapters:
            layer.fsrl_adapter[adapter_name].requires_grad_(False)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's version expects a `.weight`, which a decoder layer does not have. It is only
        # reached when an adapter is unloaded.
        if isinstance(child, FSRLLayer):
            new_module = child.detach_hook()
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        guard = model.__dict__.pop(_CACHE_GUARD, None)
        if guard is not None:
            guard.remove()
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops `adapter_names` after this, so whoever passed it would never know.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "FSRL steers every sample of a batch with the active adapter: `adapter_names` is "
                "not supported. Choose one with `model.set_adapter(...)`, or make one forward pass "
                "per adapter."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise ValueError(merge_refusal())


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


def _load_bound_sae(config: FSRLConfig) -> FrozenSAE:
    reference = config.resolve_sae()
    if isinstance(reference, FrozenSAE):
        sae = reference
    elif isinstance(reference, (str, Mapping)):
        sae = load_sae(reference)
    else:
        sae = freeze_sae(reference)
    expected = (config.sae_info or {}).get("fingerprint")
    if expected is not None and expected != sae.info.fingerprint:
        raise ValueError(
            "The SAE has changed since this adapter was saved: expected fingerprint "
            f"{expected[:16]}... ({config.sae_info}), found {sae.info.fingerprint[:16]}... in "
            f"{reference} ({sae.info}). The adapter's features would mean something else. Point "
            "`sae` at the SAE that it was trained with."
        )
    config.bind_sae(sae, sae.info.to_dict())
    return sae if config.sae_dtype is None else sae.to(sae.device, _torch_dtype(config.sae_dtype))


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"`sae_dtype` must name a floating-point dtype of torch, such as 'float32' or "
            f"'bfloat16'; got {name!r}."
        )
    return dtype


def _resolve_layer(config: FSRLConfig, sae: FrozenSAE, model: nn.Module) -> str:
    hooked = parse_hook_layer(sae.info.hook_name)
    layer = hooked if config.layer is None else int(config.layer)
    if layer is None:
        raise ValueError(
            "FSRLConfig needs `layer` (or `target_modules`): the SAE's hook name "
            f"{sae.info.hook_name!r} does not say at which decoder layer's output it was trained."
        )
    paths = decoder_layers(model)
    if layer not in paths:
        raise ValueError(
            f"Layer {layer} does not exist: {type(model).__name__} has {len(paths)} decoder "
            f"layers, 0 to {len(paths) - 1}."
        )
    if hooked is not None and hooked != layer:
        warnings.warn(
            f"The SAE was trained on the output of layer {hooked} (hook {sae.info.hook_name!r}), "
            f"but layer={layer} will be steered. Its features may mean nothing there. Use "
            f"layer={hooked}, or an SAE for layer {layer}.",
            stacklevel=2,
        )
    elif hooked is None and sae.info.hook_name is not None:
        warnings.warn(
            f"The SAE was trained at hook {sae.info.hook_name!r}, which is not the output of a "
            f"decoder layer, but the output of layer {layer} will be steered. Name the module that "
            "the SAE belongs to with `target_modules`.",
            stacklevel=2,
        )
    config.layer = layer
    return paths[layer]


def _check_hidden_size(sae: FrozenSAE, model: nn.Module) -> None:
    hidden_size = _text_config(model).get("hidden_size")
    if hidden_size is not None and hidden_size != sae.info.d_in:
        raise ValueError(
            f"The SAE reads activations of width {sae.info.d_in}, but {type(model).__name__} has "
            f"hidden size {hidden_size}. Use an SAE that was trained on this model "
            f"(this one: {sae.info.model_name or 'unknown model'}, {sae.info.hook_name})."
        )


def _warn_of_other_model(sae: FrozenSAE, model: nn.Module) -> None:
    trained_on, name = sae.info.model_name, getattr(model, "name_or_path", None)
    if not trained_on or not name:
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


def _guard_cache(sae: FrozenSAE, model: nn.Module) -> None:
    if sae.contextual and _CACHE_GUARD not in model.__dict__:
        guard = model.register_forward_pre_hook(_refuse_cached_context, with_kwargs=True)
        model.__dict__[_CACHE_GUARD] = guard


def _refuse_cached_context(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if cache is None or cache.get_seq_length() == 0:
        return
    steering = [m for m in model.modules() if isinstance(m, FSRLLayer) and not m.disable_adapters]
    active = {
        layer.fsrl_sae[name].info.architecture
        for layer in steering
        for name in layer.active_adapters
        if name in layer.fsrl_sae and layer.fsrl_sae[name].contextual
    }
    if active:
        raise ValueError(
            f"An SAE of architecture {min(active)} reads the whole sequence, but this forward "
            "continues from a key-value cache. Generate with `use_cache=False`."
        )
