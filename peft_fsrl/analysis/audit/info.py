"""What was trained, in words."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from ...records import Record
from ...steering import adapter_configs, base_model
from ...training.running import trained_modules
from ..labels import Labels
from ..segments import active_adapter, only_layer

_SETTINGS = (
    "layer",
    "target_modules",
    "activation",
    "rank",
    "non_negative",
    "l1_coeff",
    "l2_coeff",
    "l0_coeff",
    "target_l0",
    "penalty_reduction",
)


@dataclass(frozen=True)
class Setting(Record):
    """A name and a value, both for people."""

    name: str
    value: str


@dataclass(frozen=True)
class AdapterInfo(Record):
    """What was trained.

    Attributes:
        adapter: name or path of the adapter.
        base_model: name or path of the base model, if known.
        sae: reference of the SAE.
        neuronpedia_id: its id there, ``"model/source"``, if known.
        hook_name: where it reads, if known.
        fingerprint: SHA-256 of the SAE.
        weights: SHA-256 of all that was trained and of the settings it was trained with.
        d_in: width of the activations.
        d_sae: number of features.
        n_parameters: trained parameters.
        settings: of the adapter and the training, in the order to show them.
    """

    adapter: str
    base_model: str | None
    sae: str
    neuronpedia_id: str | None
    hook_name: str | None
    fingerprint: str
    weights: str
    d_in: int
    d_sae: int
    n_parameters: int
    settings: tuple[Setting, ...]


def describe_adapter(model: nn.Module, adapter: str, weights: str) -> AdapterInfo:
    """The record of a model's one active adapter, and of what was trained beside it.

    Args:
        model: a model with one FSRL layer.
        adapter: what to call it.
        weights: SHA-256 of what was trained.
    """
    layer = only_layer(model)
    name = active_adapter(layer)
    config, sae = adapter_configs(model)[name], layer.fsrl_sae[name]
    settings = {key: getattr(config, key, None) for key in _SETTINGS}
    if sae.features is not None:
        settings["features"] = f"{sae.n_features:,} of {sae.info.d_sae:,}"
    beside = trained_modules(model)
    if beside:
        settings["modules_to_save"] = ", ".join(
            f"{path.removeprefix('base_model.model.')} "
            f"({_count(module.modules_to_save):,} parameters)"
            for path, module in beside.items()
        )
    return AdapterInfo(
        adapter=adapter,
        base_model=_short_name(getattr(base_model(model), "name_or_path", None) or None),
        sae=_describe_reference(config.sae) or sae.info.fingerprint[:16],
        neuronpedia_id=sae.info.neuronpedia_id,
        hook_name=sae.info.hook_name,
        fingerprint=sae.info.fingerprint,
        weights=weights,
        d_in=sae.info.d_in,
        d_sae=sae.info.d_sae,
        n_parameters=_count(layer.fsrl_adapter[name]),
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


def short_texts(labels: Labels | None) -> dict[int, str]:
    """What labels say about features, in a few words."""
    return {
        label.feature: label.description or ", ".join(label.categories)
        for label in (labels.features if labels else ())
        if label.description or label.categories
    }


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


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
