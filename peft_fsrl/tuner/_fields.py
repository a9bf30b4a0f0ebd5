"""Values of ``FSRLConfig``'s fields: what they may be, and how they become plain JSON."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping
from typing import Any

# How a config stores an SAE that has no address of its own: a live object that has not been saved
# yet, or the copy in a folder next to the adapter's weights.
BESIDE = "beside_adapter"
LIVE_SAE = "<live>"
SAVED_SAE_FOLDER = "sae"


def plain(modules: Any) -> Any:
    """A set of module names as a list, which JSON can hold in one order."""
    return sorted(modules) if isinstance(modules, (set, frozenset)) else modules


def is_layer_mapping(sae: Any) -> bool:
    """Whether a mapping goes from layers to SAEs, and is not itself a reference to one."""
    return isinstance(sae, Mapping) and all(str(key).isdecimal() for key in sae) and bool(sae)


def is_beside(reference: Any) -> bool:
    """Whether a reference means the copy of an SAE next to the adapter."""
    return isinstance(reference, Mapping) and set(reference) == {BESIDE}


def plain_features(features: Any) -> Any:
    """Feature indices as lists of integers, which JSON can hold; by layer where they are."""
    if features is None:
        return None
    if isinstance(features, Mapping):
        return {str(layer): plain_features(chosen) for layer, chosen in features.items()}
    chosen = sorted({operator.index(feature) for feature in features})
    if not chosen or chosen[0] < 0:
        raise ValueError(f"Expected feature indices of 0 or more, at least one; got {chosen[:5]}.")
    return chosen


def require_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")


def require_one_sae_per_layer(config: Any) -> None:
    """One SAE for one layer, or a mapping with an SAE for each of several."""
    layers = config.layers
    if len(set(layers)) != len(layers) or config.layer == []:
        raise ValueError(f"`layer` must name each layer once, at least one; got {config.layer}.")
    given = set(config.sae) if is_layer_mapping(config.sae) else None
    for name in ("features", "exclude_features"):
        by_layer = getattr(config, name)
        if isinstance(by_layer, Mapping) and not set(by_layer) <= (given or set()):
            raise ValueError(
                f"`{name}` by layer goes with `sae` by layer: expected layers among "
                f"{sorted(given or [])}, got {sorted(by_layer)}. For one SAE, give a list."
            )
    if given is not None and given != {str(layer) for layer in layers}:
        raise ValueError(
            f"`sae` must have one SAE for each of the layers {layers}, found SAEs for "
            f"{sorted(given)}."
        )
    if given is None and len(layers) > 1:
        raise ValueError(
            f"Several layers need an SAE each: pass `sae` as a mapping from layer to SAE, got "
            f"one SAE for {layers}."
        )


def require_schedule(config: Any) -> None:
    """Check the fields that say how the penalty's weight moves during training."""
    if config.penalty_warmup_ratio > 1:
        raise ValueError(
            "`penalty_warmup_ratio` is a share of the training steps, at most 1; got "
            f"{config.penalty_warmup_ratio}."
        )
    if config.target_l0 is None:
        return
    require_number("target_l0", config.target_l0, positive=True)
    if not config.l1_coeff and not config.l0_coeff:
        raise ValueError(
            "`target_l0` moves the penalty's weight from where it starts, which must not be zero. "
            "Give `l1_coeff` (or `l0_coeff`) a positive start."
        )


def plain_integers(value: Any) -> Any:
    """NumPy's integers as Python's, which JSON can hold; what is no integer is left alone."""
    if isinstance(value, (list, tuple)):
        return [plain_integers(each) for each in value]
    return operator.index(value) if is_integer(value) else value


def is_integer(value: Any) -> bool:
    # NumPy's integers are not `int`, but like it have `__index__`; floats and strings have not.
    return hasattr(value, "__index__") and not isinstance(value, bool)


def require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def require_number(name: str, value: Any, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        wanted = "positive" if positive else "not negative"
        raise ValueError(f"`{name}` must be finite and {wanted}, got {value}.")


def beside_folder(layer: str) -> str:
    """Folder, inside the adapter's, for the SAE of a layer, or of all targets under ``""``.

    Never nested: ``push_to_hub`` uploads folders one level deep.
    """
    return f"{SAVED_SAE_FOLDER}_layer_{layer}" if layer else SAVED_SAE_FOLDER


def adapter_folder(
    name_or_path: str, subfolder: str | None, beside: list[str], kwargs: Mapping[str, Any]
) -> str:
    """The folder of an adapter, local or fetched from the Hub with the SAEs beside it."""
    local = os.path.join(name_or_path, subfolder) if subfolder else name_or_path
    if os.path.isdir(local):
        return os.path.abspath(local)
    from huggingface_hub import snapshot_download

    inside = f"{subfolder}/" if subfolder else ""
    allowed = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    root = snapshot_download(
        name_or_path,
        allow_patterns=[f"{inside}{folder}/*" for folder in beside],
        **{key: kwargs[key] for key in allowed if key in kwargs},
    )
    return os.path.join(root, subfolder) if subfolder else root
