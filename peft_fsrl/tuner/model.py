"""``FSRLModel``: loads the SAEs, and puts an ``FSRLLayer`` around what each of them reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import skip_init_on_device
from torch import nn

from ..sae.frozen import FrozenSAE
from ..sae.loading import take_sae
from .config import FSRLConfig
from .events import Scoped
from .folder import check_state
from .layer import FSRLLayer, merge_refusal
from .placement import reads_heads, resolve_targets, warn_of_other_model

_CACHE_GUARD = "_fsrl_cache_guard"
# PEFT's name, in a mixed batch, for a sample that no adapter changes.
_BASE = "__base__"


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
    _saes_to_inject: Mapping[str, FrozenSAE] = MappingProxyType({})

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Add an adapter; see ``peft.tuners.tuners_utils.BaseTuner.inject_adapter``."""
        _refuse_second(adapter_name, model)
        # The user's object stays as it is: what is found out about this model goes to the layers.
        config = self.peft_config[adapter_name]
        config._used = config.copied()
        try:
            super().inject_adapter(model, adapter_name, **kwargs)
        finally:
            # From here on only the layers hold the SAEs: a copy that none of them uses is freed.
            self._saes_to_inject = {}
            config._used = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model; not its `forward`, as older PEFT does, which skips its hooks."""
        return self.model(*args, **kwargs)

    def _prepare_adapter_config(
        self, peft_config: FSRLConfig, model_config: dict[str, Any]
    ) -> FSRLConfig:
        return peft_config

    def _prepare_model(self, peft_config: FSRLConfig, model: nn.Module) -> None:
        """Load the SAEs and settle every question about targets before anything is changed."""
        used = _used_config(peft_config)
        # Under `low_cpu_mem_usage=True` PEFT sends new parameters to `meta`: not those of the SAE.
        saes: dict[str, FrozenSAE] = skip_init_on_device(_load_bound_saes)(used)
        for sae in saes.values():
            warn_of_other_model(sae, model)
            if used.starts_from_encoder:
                sae.encoder_rows()
        if used.target_modules is None:
            _refuse_narrowing(used)
            saes = resolve_targets(used, saes, model)
            used._target_paths = frozenset(saes)
        _refuse_nesting(set(self._match_targets(peft_config, model)), model)
        self._saes_to_inject = saes
        for sae in saes.values():
            _guard_cache(sae, model)

    def _match_targets(self, peft_config: FSRLConfig, model: nn.Module) -> list[str]:
        """Paths of the modules that a config names, as PEFT will find them."""
        names = [name for name, _ in model.named_modules() if name]
        return [name for name in names if self._check_target_module_exists(peft_config, name)]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active; where two meet on one layer, none of the layers is changed.

        Raises:
            ValueError: for two adapters on one layer.
        """
        modules = list(self.model.modules())
        for module in modules:
            if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(adapter_name, str):
                module.check_set_adapter(adapter_name)
        for module in modules:
            if isinstance(module, FSRLLayer):
                module.require_one(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @staticmethod
    def _check_target_module_exists(peft_config: FSRLConfig, key: str) -> Any:
        paths = _used_config(peft_config)._target_paths
        if paths is not None:
            return key in paths
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
        sae = self._saes_to_inject.get(current_key) or self._saes_to_inject[""]
        used = _used_config(peft_config)
        if isinstance(target, FSRLLayer):
            target.update_layer(adapter_name, used, sae)
            layer = target
        else:
            layer = FSRLLayer(target, current_key, reads_heads(sae))
            layer.update_layer(adapter_name, used, sae)
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

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kw: Any) -> nn.Module:
        if not merge:
            self._unload_trained_copies()
        model: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kw)
        guard = model.__dict__.pop(_CACHE_GUARD, None)
        if guard is not None:
            guard.remove()
        return model

    def _unload_trained_copies(self) -> None:
        """Put the base's own modules back where `modules_to_save` stand.

        PEFT would leave the trained copies, and does not look inside wrapped modules.
        """
        for path, module in reversed(list(self.model.named_modules())):
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.set_adapter([])
                original = module.unload_and_optionally_merge_module(
                    merge=False, safe_merge=False, adapter_names=None
                )
                parent, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent), name, original)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Steer each sample with its own adapter where a caller passes ``adapter_names``."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        repeated = [name for name in names for _ in range(_copies_per_sample(kwargs))]
        encoder = _encoder_modules(self.model)
        stack = ExitStack()
        for module in self.modules():
            # `generate` repeats what the decoder sees, not what an encoder has read.
            per_sample = list(names) if module in encoder else repeated
            if isinstance(module, FSRLLayer):
                stack.enter_context(Scoped(per_sample, module.batch_adapter_names))
            elif isinstance(module, AuxiliaryTrainingWrapper):
                # `modules_to_save` are chosen per sample too, by PEFT, which wants the names here.
                hook = partial(_pass_adapter_names, adapter_names=per_sample)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        with stack:
            yield

    def _check_adapter_names(self, names: Sequence[str]) -> None:
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call "
                "`model.eval()` first."
            )
        known = {_BASE, *self.peft_config}
        if not set(names) <= known:
            raise ValueError(
                "Trying to infer with non-existing adapter(s): "
                f"{', '.join(sorted(set(names) - known))}. Expected names among {sorted(known)}."
            )

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        """PEFT's own. It comes before the config is saved, which then learns what is used here."""
        config._used = find_used_config(model, adapter_name)
        selected: dict[str, Any] = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, **kwargs
        )
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """PEFT's own, whose result is compared with the adapter before any of it is loaded."""
        remapped: dict[str, Any] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        says = f"activation={config.activation!r}, rank={config.rank}, layer={config.layer}"
        check_state(model, adapter_name, remapped, says)
        return remapped

    def _check_merge_allowed(self) -> None:
        raise ValueError(merge_refusal())


def find_used_config(model: nn.Module, adapter_name: str) -> FSRLConfig | None:
    """An adapter's config as the layers of a model use it; None where no layer has the adapter."""
    layers = (module for module in model.modules() if isinstance(module, FSRLLayer))
    found = (layer.fsrl_config.get(adapter_name) for layer in layers)
    return next((config for config in found if config is not None), None)


def _used_config(config: FSRLConfig) -> FSRLConfig:
    return config if config._used is None else config._used


def _load_bound_saes(config: FSRLConfig) -> dict[str, FrozenSAE]:
    """Load each SAE of a config, check that it is the one it was, and restrict it as asked."""
    saes = {}
    for key, reference in config.resolve_saes().items():
        sae = _load_bound_sae(config, key, reference)
        features = config.select_features(key, sae.info.d_sae)
        if config.sae_dtype is not None:
            sae = sae.to(sae.device, _torch_dtype(config.sae_dtype))
        saes[key] = sae if features is None else sae.restrict(features)
    return saes


def _load_bound_sae(config: FSRLConfig, key: str, reference: Any) -> FrozenSAE:
    sae = take_sae(reference)
    known = config.sae_info or {}
    expected = known.get(key, {}).get("fingerprint")
    if expected is not None and expected != sae.info.fingerprint:
        raise ValueError(
            "The SAE has changed since this adapter was saved: expected fingerprint "
            f"{expected[:16]}... ({known[key]}), found "
            f"{sae.info.fingerprint[:16]}... in {reference} ({sae.info}). The adapter's features "
            "would mean something else. Point `sae` at the SAE that it was trained with, or set "
            "`sae_info=None` to start a new adapter on this one."
        )
    config.bind_sae(sae, sae.info.to_dict(), key)
    return sae


def _refuse_second(adapter_name: str, model: nn.Module) -> None:
    """As a notebook cell that is run again does: both adapters would act, and one be saved."""
    for module in model.modules():
        if isinstance(module, FSRLLayer) and adapter_name in module.fsrl_adapter:
            raise ValueError(
                f"This model already has an FSRL adapter '{adapter_name}', at "
                f"'{module.layer_name}'. Call `unload()` on the PEFT model that was made of it "
                "first, load the base model again, or give the new adapter another name."
            )


def _refuse_nesting(targets: set[str], model: nn.Module) -> None:
    """A module inside a wrapped one has another path: its adapter's tensors would not be found."""
    wrapped = {name for name, module in model.named_modules() if isinstance(module, FSRLLayer)}
    for inner in sorted({*targets, *wrapped}):
        parts = inner.split(".")
        for outer in (".".join(parts[:depth]) for depth in range(1, len(parts))):
            if outer in targets or (outer in wrapped and inner in targets):
                raise ValueError(
                    f"'{inner}' lies inside '{outer}', which FSRL also steers: wrapping one "
                    "changes the other's path, and a saved adapter could not be loaded. Steer "
                    "one of them, or use two models."
                )


def _refuse_narrowing(config: FSRLConfig) -> None:
    # Not when the config is made: PEFT's configs can be completed afterwards.
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None:
            raise ValueError(f"`{name}` needs `target_modules`, which it narrows down. Give both.")


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"`sae_dtype` must name a floating-point dtype of torch, such as 'float32' or "
            f"'bfloat16'; got {name!r}."
        )
    return dtype


def _pass_adapter_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _encoder_modules(model: Any) -> set[nn.Module]:
    """The modules that run before ``generate`` repeats samples; none without a decoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    encoder: nn.Module = model.get_encoder()
    return set(encoder.modules())


def _copies_per_sample(kwargs: Mapping[str, Any]) -> int:
    """How many rows ``generate`` makes of each sample, for beams or several returned sequences."""
    config = kwargs.get("generation_config")
    options = ("num_beams", "num_return_sequences")
    counts = [kwargs.get(name) or getattr(config, name, None) or 1 for name in options]
    return max(counts)


def _guard_cache(sae: FrozenSAE, model: nn.Module) -> None:
    if sae.contextual and _CACHE_GUARD not in model.__dict__:
        guard = model.register_forward_pre_hook(_refuse_cached_context, with_kwargs=True)
        model.__dict__[_CACHE_GUARD] = guard


def _refuse_cached_context(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    continues = cache is not None and cache.get_seq_length() > 0
    padded_left = isinstance(mask, torch.Tensor) and mask.dim() == 2 and not mask[:, 0].all()
    if not continues and not padded_left:
        return
    steering = [m for m in model.modules() if isinstance(m, FSRLLayer) and not m.disable_adapters]
    active = {
        layer.fsrl_sae[name].info.architecture
        for layer in steering
        for name in layer.acting_adapters()
        if name in layer.fsrl_sae and layer.fsrl_sae[name].contextual
    }
    if active:
        found = (
            "continues from a key-value cache. Generate with `use_cache=False`"
            if continues
            else "is padded on the left, and it would read the padding. Pad on the right"
        )
        raise ValueError(
            f"An SAE of architecture {min(active)} reads the whole sequence, but this forward "
            f"{found}."
        )
