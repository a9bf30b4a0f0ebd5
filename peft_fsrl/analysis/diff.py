"""Two adapters on the same SAE, feature by feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..records import Record
from ..tuner.layer import FSRLLayer
from . import statistics
from .segments import only_layer
from .session import Session
from .usage import FeatureUse, compute_usage


@dataclass(frozen=True)
class FeatureDifference(Record):
    """One feature as two adapters use it.

    Attributes:
        feature: index in the SAE.
        first: the first adapter's use, or None where it never steers it.
        second: the second's.
        cosine: between the two adapters' rows of weights and bias; None where one has no row.
        label: what it detects, if known.
    """

    feature: int
    first: FeatureUse | None
    second: FeatureUse | None
    cosine: float | None
    label: str | None


@dataclass(frozen=True)
class AdapterDifference(Record):
    """Two adapters on the same SAE, feature by feature, largest difference of mean ``v`` first.

    Attributes:
        first: name of the first.
        second: name of the second.
        dataset: whose chosen answers were read.
        n_tokens: tokens counted.
        first_l0: features steered per token.
        second_l0: of the second.
        overlap: share of the features steered by either that both steer.
        correlation: Spearman's, of the mean ``v`` over those features; None below three.
        features: one entry per feature, cut at some number.
    """

    first: str
    second: str
    dataset: str
    n_tokens: int
    first_l0: float
    second_l0: float
    overlap: float
    correlation: float | None
    features: tuple[FeatureDifference, ...]


def compute_difference(
    session: Session,
    first: str,
    second: str,
    *,
    names: tuple[str, str] | None = None,
    labels: Mapping[int, str] | None = None,
    n_features: int | None = 100,
    dataset_name: str = "data",
) -> AdapterDifference:
    """How two adapters use each feature on the same chosen answers, and how alike they compute it.

    Args:
        session: its model has both adapters on one layer; which one is active is restored. Rows
            need no ``rejected``.
        first: name of one adapter in the model.
        second: name of the other.
        names: how the record calls them; None for their names in the model.
        labels: what features detect, where known.
        n_features: keep the features with the largest difference of mean ``v``; None keeps all.
        dataset_name: shown in the record.

    Raises:
        ValueError: for adapters at different places or on different SAEs: their features have
            nothing to do with each other.
        ImportError: without the ``audit`` extra.
    """
    statistics.require()
    model = session.model
    layer = only_layer(model)
    _require_same_sae(layer, first, second)
    usages = []
    with _restoring_active(model, layer):
        for adapter in (first, second):
            _activate(model, adapter)
            usages.append(compute_usage(session, labels=labels))
    uses = [{use.feature: use for use in usage.features} for usage in usages]
    features = sorted(
        set().union(*uses), key=lambda feature: (-abs(_shift(uses, feature)), feature)
    )
    means = [[_mean(use.get(feature)) for feature in features] for use in uses]
    kept = features[:n_features]
    cosines = _cosines(layer, first, second, kept)
    entries = tuple(
        FeatureDifference(
            feature,
            uses[0].get(feature),
            uses[1].get(feature),
            cosines.get(feature),
            (labels or {}).get(feature),
        )
        for feature in kept
    )
    both = len(uses[0].keys() & uses[1].keys())
    shown = names or (first, second)
    return AdapterDifference(
        first=shown[0],
        second=shown[1],
        dataset=dataset_name,
        n_tokens=usages[0].n_tokens,
        first_l0=usages[0].l0,
        second_l0=usages[1].l0,
        overlap=both / len(features) if features else 0.0,
        correlation=statistics.spearman(*means),
        features=entries,
    )


def _require_same_sae(layer: FSRLLayer, first: str, second: str) -> None:
    missing = [name for name in (first, second) if name not in layer.fsrl_sae]
    if missing:
        raise ValueError(
            f"Expected adapters {first!r} and {second!r} at {layer.layer_name}, found "
            f"{sorted(layer.fsrl_sae)}. Only adapters of the same layer can be compared."
        )
    one, other = (layer.fsrl_sae[name].info for name in (first, second))
    if one.fingerprint != other.fingerprint:
        raise ValueError(
            f"Expected two adapters on the same SAE, found fingerprints {one.fingerprint[:16]}... "
            f"({first!r}) and {other.fingerprint[:16]}... ({second!r}): feature 5 of one has "
            "nothing to do with feature 5 of the other. Compare adapters that were trained on one "
            "SAE."
        )


@contextmanager
def _restoring_active(model: Any, layer: FSRLLayer) -> Iterator[None]:
    active = list(layer.active_adapters)
    # `set_adapter` makes what it activates trainable, and the rest not.
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        yield
    finally:
        _activate(model, active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])


def _activate(model: Any, adapter: str | list[str]) -> None:
    # The tuner's own, for PEFT's takes one name only.
    tuner = getattr(model, "base_model", model)
    tuner.set_adapter(adapter)


def _mean(use: FeatureUse | None) -> float:
    return use.mean_steering if use else 0.0


def _shift(uses: Sequence[Mapping[int, FeatureUse]], feature: int) -> float:
    return _mean(uses[1].get(feature)) - _mean(uses[0].get(feature))


def _cosines(
    layer: FSRLLayer, first: str, second: str, features: Sequence[int]
) -> dict[int, float]:
    """Cosine of ``(weight, bias)`` of each feature for which both adapters have a row."""
    shared = [set(layer.fsrl_sae[name].feature_index.tolist()) for name in (first, second)]
    common = [feature for feature in features if feature in shared[0] & shared[1]]
    if not common:
        return {}
    one, other = (_rows(layer, name, common) for name in (first, second))
    values = torch.nn.functional.cosine_similarity(one, other, dim=1)
    return dict(zip(common, values.tolist(), strict=True))


def _rows(layer: FSRLLayer, name: str, features: Sequence[int]) -> Tensor:
    adapter: Any = layer.fsrl_adapter[name]
    index = layer.fsrl_sae[name].feature_index.tolist()
    place = {feature: row for row, feature in enumerate(index)}
    rows = torch.tensor([place[feature] for feature in features], device=adapter.weight.device)
    weight = adapter.weight.detach()[rows].double()
    if adapter.down is not None:
        weight = weight @ adapter.down.detach().double()
    row = torch.cat([weight, adapter.bias.detach()[rows].double()[:, None]], dim=1)
    if adapter.activation == "gain":
        # The rows are the SAE's own, in any adapter: what was learned is which way they act.
        row = row * adapter.gain.detach()[rows].double()[:, None]
    return row.cpu()
