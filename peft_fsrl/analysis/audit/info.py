"""What was trained, in words."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from ...steering import adapter_configs, base_model
from ...tuner.layer import FSRLLayer
from ..records import AdapterInfo, Setting

_SETTINGS = (
    "layer",
    "target_modules",
    "activation",
    "rank",
    "non_negative",
    "l1_coeff",
    "l0_coeff",
    "target_l0",
    "penalty_reduction",
)


def describe_adapter(model: nn.Module, layer: FSRLLayer) -> AdapterInfo:
    """The record of a model's one adapter, without its name and the digest of its tensors."""
    [name] = [each for each in layer.active_adapters if each in layer.fsrl_sae]
    config, sae = adapter_configs(model)[name], layer.fsrl_sae[name]
    settings = {key: getattr(config, key, None) for key in _SETTINGS}
    if sae.features is not None:
        settings["features"] = f"{sae.n_features:,} of {sae.info.d_sae:,}"
    return AdapterInfo(
        adapter=name,
        base_model=_short_name(getattr(base_model(model), "name_or_path", None) or None),
        sae=_describe_reference(config.sae) or sae.info.fingerprint[:16],
        neuronpedia_id=sae.info.neuronpedia_id,
        hook_name=sae.info.hook_name,
        fingerprint=sae.info.fingerprint,
        weights="",
        d_in=sae.info.d_in,
        d_sae=sae.info.d_sae,
        n_parameters=sum(p.numel() for p in layer.fsrl_adapter[name].parameters()),
        settings=tuple(
            Setting(key, f"{value:g}" if isinstance(value, float) else str(value))
            for key, value in settings.items()
            if value is not None
        ),
    )


def version_of(package: str) -> str:
    """The version of an installed package, ``"unknown"`` in a source tree that nobody installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def feature_url(neuronpedia_id: str | None, feature: int) -> str | None:
    """A feature's page on Neuronpedia, where the SAE has an id there."""
    if not neuronpedia_id:
        return None
    return f"https://www.neuronpedia.org/{quote(neuronpedia_id)}/{feature}"


def _describe_reference(reference: Any) -> str | None:
    if isinstance(reference, Mapping):
        names = [str(reference[key]) for key in ("release", "sae_id", "path") if key in reference]
        reference = "/".join(names)
    return _short_name(str(reference)) if reference else None


def _short_name(name: str | None) -> str | None:
    """A name from the Hub as it is; of a folder only its end, for the rest says where it lay."""
    if name is None or not Path(name).is_absolute():
        return name
    return "/".join(Path(name).parts[-2:])
