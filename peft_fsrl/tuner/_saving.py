"""Make PEFT save FSRL adapters whole or not at all, and never load a damaged one in silence.

PEFT writes a checkpoint's files one by one over those that are there, and a tuner is told neither
before nor after, so its methods are wrapped. Other methods' adapters go through untouched.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from peft.config import PeftConfigMixin
from transformers.integrations import PeftAdapterMixin

from .folder import finish_save, replacing, verify

_NAME = "FSRL"
_PREFIX = "fsrl_"
_WRAPPED = "_fsrl_saving"


def guard_checkpoints() -> None:
    """Wrap PEFT's saving and loading of checkpoints; a second call does nothing."""
    for owner, name, wrapper in (
        (PeftModel, "save_pretrained", _wrap_save_pretrained),
        (PeftModel, "load_adapter", _wrap_load_adapter),
        (PeftConfigMixin, "from_pretrained", _wrap_from_pretrained),
        (PeftAdapterMixin, "load_adapter", _wrap_transformers_load_adapter),
    ):
        original = owner.__dict__[name]
        method = getattr(original, "__func__", original)
        if hasattr(method, _WRAPPED):
            continue
        wrapped = wraps(method)(wrapper(method))
        setattr(wrapped, _WRAPPED, True)
        kind = classmethod if isinstance(original, classmethod) else lambda function: function
        setattr(owner, name, kind(wrapped))


def _wrap_save_pretrained(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        writes = given.get("is_main_process", True) and not os.path.isfile(save_directory)
        if not writes or not any(_is_fsrl(config) for config in self.peft_config.values()):
            return original(self, save_directory, *args, **kwargs)
        with replacing(save_directory) as staging:
            original(self, str(staging), *args, **kwargs)

    return save_pretrained


def _wrap_load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        is_new = adapter_name not in self.peft_config
        if not is_new and _is_fsrl(self.peft_config[adapter_name]):
            # Otherwise PEFT reads the config, and with it the folder is checked.
            open_checkpoint(model_id, kwargs.get("subfolder"))
        result = original(self, model_id, adapter_name, *args, **kwargs)
        partial = kwargs.get("ignore_mismatched_sizes", False)
        _check_loaded(self, adapter_name, result, model_id, partial=partial, undo=is_new)
        return result

    return load_adapter


def _wrap_transformers_load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        # Older transformers do not say what they loaded.
        if result is not None:
            source = given.get("peft_model_id") or "the given state dict"
            _check_loaded(self, given.get("adapter_name") or "default", result, source)
        return result

    return load_adapter


def _check_loaded(
    model: Any,
    adapter_name: str,
    result: Any,
    source: Any,
    *,
    partial: bool = False,
    undo: bool = True,
) -> None:
    """Refuse an FSRL adapter without all of its tensors, and report nan in them."""
    config = model.peft_config[adapter_name]
    if not _is_fsrl(config):
        return
    if not partial:
        try:
            _require_all_keys(result, source, config, adapter_name)
        except ValueError:
            if undo:
                model.delete_adapter(adapter_name)
            raise
    _warn_of_nonfinite(model, adapter_name, source)


def _wrap_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(
        cls: type, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        folder = _local_folder(pretrained_model_name_or_path, subfolder)
        if folder is not None:
            finish_save(folder)
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if _is_fsrl(config):
            if folder is not None:
                verify(folder)
            # PEFT builds it from the contents of its file alone, whichever class is asked to.
            config.locate(str(pretrained_model_name_or_path), subfolder, kwargs)
        return config

    return from_pretrained


def open_checkpoint(name_or_path: Any, subfolder: str | None = None) -> None:
    """Finish a save that was killed and check the files of an adapter's folder, if it is one.

    Raises:
        ValueError: for damaged weights; see ``_checkpoints.verify``.
    """
    folder = _local_folder(name_or_path, subfolder)
    if folder is not None:
        finish_save(folder)
        verify(folder)


def _local_folder(name_or_path: Any, subfolder: str | None) -> str | None:
    """The folder that a name means; None for a repository on the Hub, which checks its own."""
    folder = os.path.join(name_or_path, subfolder) if subfolder else os.fspath(name_or_path)
    return folder if os.path.isdir(folder) else None


def _is_fsrl(config: Any) -> bool:
    return bool(getattr(config, "peft_type", None) == _NAME)


def _require_all_keys(result: Any, model_id: Any, config: Any, adapter_name: str) -> None:
    # PEFT's list has those of every adapter in whose name, or path, this one's occurs.
    own = f".{_PREFIX}adapter.{adapter_name}."
    missing = sorted(key for key in result.missing_keys if own in key)
    foreign = sorted(key for key in result.unexpected_keys if _PREFIX in key)
    if missing or foreign:
        raise ValueError(
            f"The weights in {model_id} do not belong to this adapter's config (activation="
            f"{config.activation!r}, rank={config.rank}, layer={config.layer}) or this model: "
            f"expected {missing or 'no further tensors'}, found {foreign or 'none'} instead. Load "
            "the weights with the config and the base model that they were trained with."
        )


def _warn_of_nonfinite(model: Any, adapter_name: str, model_id: Any) -> None:
    bad = [
        name
        for name, parameter in model.named_parameters()
        if f".{adapter_name}." in name
        and _PREFIX in name
        and not parameter.is_meta
        and parameter.numel()
        # Not of each value, which would take as much memory again.
        and not all(torch.isfinite(extreme) for extreme in parameter.detach().aminmax())
    ]
    if bad:
        warnings.warn(
            f"The weights in {model_id} contain nan or inf, in {bad}: the adapter's output will "
            "too. Training diverged before they were saved: load an earlier checkpoint.",
            stacklevel=5,
        )
