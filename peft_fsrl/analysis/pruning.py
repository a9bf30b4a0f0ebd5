"""Drop the features that a trained adapter does not use, and say what that cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..steering import (
    SteeringEvent,
    ablate_features,
    adapter_configs,
    base_model,
    fsrl_layers,
    observe,
)
from ..training.likelihood import compute_kl
from ..training.running import evaluating, to_device
from ..tuner.config import is_layer_mapping
from ..tuner.layer import FSRLLayer
from ..tuner.placement import decoder_layers


@dataclass(frozen=True)
class PruningReport:
    """What ``prune`` dropped and what it cost, on the data that it was given.

    Attributes:
        adapter_name: the adapter.
        tokens: how many real tokens the figures are taken over.
        features_before: number of features that could be steered, by path of the wrapped module.
        features_after: the same after pruning.
        parameters_before: the adapter's number of parameters.
        parameters_after: the same after pruning.
        dropped_steering: share of the sum of ``|v|`` that fell on dropped features, 0 to 1.
        kl_mean: mean over tokens of the Kullback-Leibler divergence, from the whole model's
            next-token distribution to the pruned one's, in nats; None for a model without logits.
        kl_max: the largest of these over tokens.
    """

    adapter_name: str
    tokens: int
    features_before: Mapping[str, int]
    features_after: Mapping[str, int]
    parameters_before: int
    parameters_after: int
    dropped_steering: float
    kl_mean: float | None
    kl_max: float | None

    def __str__(self) -> str:
        counts = ", ".join(
            f"{name}: {before} -> {self.features_after[name]}"
            for name, before in self.features_before.items()
        )
        cost = "" if self.kl_mean is None else f"; KL {self.kl_mean:.3g} nats a token"
        cost += "" if self.kl_max is None else f", at most {self.kl_max:.3g}"
        return (
            f"Steered features {counts}; parameters {self.parameters_before:,} -> "
            f"{self.parameters_after:,}. Over {self.tokens:,} tokens: "
            f"{self.dropped_steering:.3%} of the steering dropped{cost}."
        )


def prune(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str | None = None,
    max_frequency: float = 0.0,
    show_progress: bool = True,
) -> PruningReport:
    """Keep only the features that an adapter steers at more than some share of the tokens.

    The rows of the others are gone from the adapter, from its config and from what is saved;
    compute and checkpoint shrink in proportion. On the data itself, dropping what is never used
    changes nothing but rounding; on other data it may. The parameters are new objects: make a new
    optimizer to train further.

    Args:
        model: a model with FSRL adapters, changed in place.
        data: batches, each the keyword arguments of one forward pass; gone through twice. Where a
            batch has a 2-d ``attention_mask``, padding does not count.
        adapter_name: an active adapter; may be left out where only one is active.
        max_frequency: features steered at no more than this share of tokens are dropped, 0 to 1.
        show_progress: show progress bars.

    Returns:
        What was dropped, and the effect on the outputs.

    Raises:
        TypeError: for data that can be gone through only once.
        ValueError: for an adapter that is not active, no token, or no feature left.
    """
    if iter(data) is data:
        raise TypeError(
            "Expected data that can be iterated twice, such as a list or a DataLoader, got an "
            f"iterator ({type(data).__name__}). Wrap it in `list(...)`."
        )
    adapter_name = _active_adapter(model, adapter_name)
    layers = {n: m for n, m in fsrl_layers(model).items() if adapter_name in m.fsrl_adapter}
    with evaluating(model):
        use = _count(model, adapter_name, _progress(data, "use of features", show_progress))
        kept = _choose(use, layers, adapter_configs(model)[adapter_name], model, max_frequency)
        cost = _cost(model, layers, kept, use, _progress(data, "cost", show_progress))
    before = {n: layer.fsrl_sae[adapter_name].n_features for n, layer in layers.items()}
    parameters_before = _count_parameters(layers, adapter_name)
    for name, layer in layers.items():
        layer.keep_features(adapter_name, kept[name])
    _record(model, adapter_name, kept)
    return PruningReport(
        adapter_name=adapter_name,
        tokens=use.tokens,
        features_before=before,
        features_after={name: len(features) for name, features in kept.items()},
        parameters_before=parameters_before,
        parameters_after=_count_parameters(layers, adapter_name),
        dropped_steering=use.share_outside(kept),
        kl_mean=None if cost is None else cost[0],
        kl_max=None if cost is None else cost[1],
    )


class _Use:
    """Sums over tokens, by layer and feature; memory does not grow with the data."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.tokens = 0
        self.count: dict[str, Tensor] = {}
        self.size: dict[str, Tensor] = {}
        self.index: dict[str, list[int]] = {}

    def add(self, event: SteeringEvent) -> None:
        v, name = event.steering_vector, event.layer_name
        v = v.flatten(0, -2) if self.mask is None else v[self.mask.to(v.device)]
        if name not in self.count:
            self.count[name] = torch.zeros(v.shape[-1], dtype=torch.long, device=v.device)
            self.size[name] = torch.zeros(v.shape[-1], dtype=torch.float64, device=v.device)
            self.index[name] = event.sae.feature_index.tolist()
        self.count[name] += (v != 0).sum(0)
        self.size[name] += v.abs().sum(0, dtype=torch.float64)
        if name == next(iter(self.count)):
            self.tokens += v.shape[0]

    def share_outside(self, kept: Mapping[str, list[int]]) -> float:
        total = sum(float(size.sum()) for size in self.size.values())
        inside = 0.0
        for name, features in kept.items():
            places = [self.index[name].index(feature) for feature in features]
            inside += float(self.size[name][places].sum())
        # Not below zero by rounding.
        return max(0.0, 1 - inside / total)


def _count(model: nn.Module, adapter_name: str, batches: Iterable[Mapping[str, Any]]) -> _Use:
    use = _Use()

    def add(event: SteeringEvent) -> None:
        if event.adapter_name == adapter_name:
            use.add(event)

    with observe(model, add):
        for batch in batches:
            inputs = to_device(batch, model)
            use.mask = _token_mask(inputs)
            model(**inputs)
    if use.tokens == 0:
        raise ValueError("Expected at least one token on which the adapter acts, found none.")
    return use


def _choose(
    use: _Use, layers: Mapping[str, FSRLLayer], config: Any, model: nn.Module, max_frequency: float
) -> dict[str, list[int]]:
    """Features to keep by layer; layers that share one entry of the config keep the same."""
    keys = _config_keys(config, list(layers), model)
    used: dict[str, set[int]] = {key: set() for key in keys.values()}
    for name, count in use.count.items():
        places = (count.double() > max_frequency * use.tokens).nonzero().flatten().tolist()
        used[keys[name]].update(use.index[name][place] for place in places)
    if not all(used.values()):
        empty = [name for name in layers if not used[keys[name]]]
        raise ValueError(
            f"No feature would remain in {empty}: none is steered at more than "
            f"{max_frequency:.3%} of the {use.tokens} tokens. Lower `max_frequency`, or give data "
            "on which the adapter acts."
        )
    return {name: sorted(used[keys[name]]) for name in layers}


def _cost(
    model: nn.Module,
    layers: Mapping[str, FSRLLayer],
    kept: Mapping[str, list[int]],
    use: _Use,
    batches: Iterable[Mapping[str, Any]],
) -> tuple[float, float] | None:
    """Mean and largest divergence over tokens of the pruned model's distribution, in nats."""
    total, largest = 0.0, 0.0
    for batch in batches:
        inputs = to_device(batch, model)
        whole = getattr(model(**inputs), "logits", None)
        if whole is None or whole.dim() != 3:
            return None
        with ExitStack() as stack:
            for name in layers:
                dropped = set(use.index[name]) - set(kept[name])
                stack.enter_context(ablate_features(model, dropped, name))
            pruned = model(**inputs).logits
        mask = _token_mask(inputs)
        chosen = (slice(None), slice(None)) if mask is None else mask.to(whole.device)
        wide = torch.promote_types(whole.dtype, torch.float32)
        p, q = (logits[chosen].to(wide).log_softmax(-1) for logits in (whole, pruned))
        divergence = compute_kl(p, q).clamp(min=0)
        total += float(divergence.sum(dtype=torch.float64))
        largest = max(largest, float(divergence.max()))
    return total / use.tokens, largest


def _record(model: nn.Module, adapter_name: str, kept: Mapping[str, list[int]]) -> None:
    config = copy(adapter_configs(model)[adapter_name])
    keys = _config_keys(config, list(kept), model)
    by_key = {keys[name]: features for name, features in kept.items()}
    config.exclude_features = None
    config.features = by_key.get("", by_key)
    for layer in fsrl_layers(model).values():
        if adapter_name in layer.fsrl_config:
            layer.fsrl_config[adapter_name] = config


def _config_keys(config: Any, names: list[str], model: nn.Module) -> dict[str, str]:
    """Under which key of the config's mappings each module stands; ``""`` without a mapping."""
    if not is_layer_mapping(config.sae):
        return dict.fromkeys(names, "")
    paths = decoder_layers(base_model(model))
    return {paths[layer]: str(layer) for layer in config.layers}


def _active_adapter(model: nn.Module, adapter_name: str | None) -> str:
    active = {
        name
        for layer in fsrl_layers(model).values()
        for name in layer.active_adapters
        if name in layer.fsrl_adapter
    }
    if adapter_name is None and len(active) == 1:
        return active.pop()
    if adapter_name not in active:
        raise ValueError(
            f"Expected `adapter_name` to be an active FSRL adapter, one of {sorted(active)}, got "
            f"{adapter_name!r}. Activate it with `set_adapter`."
        )
    return str(adapter_name)


def _count_parameters(layers: Mapping[str, FSRLLayer], adapter_name: str) -> int:
    adapters = [layer.fsrl_adapter[adapter_name] for layer in layers.values()]
    return sum(parameter.numel() for a in adapters for parameter in a.parameters())


def _token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask > 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _progress(data: Iterable[Mapping[str, Any]], what: str, show: bool) -> Any:
    total = len(data) if isinstance(data, Sized) else None
    return tqdm(data, desc=f"prune: {what}", total=total, disable=not show, leave=False)
