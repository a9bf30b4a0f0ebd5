"""Observe and edit what FSRL adapters do: the one place where steering is seen from outside.

Everything here attaches to a model for the length of a ``with`` block, in the thread or asyncio
task that opened it, and leaves nothing behind. A thread that is started inside the block is outside
of it, unless it runs in a copy of the context (``contextvars.copy_context().run``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .sae.frozen import FrozenSAE
from .tuner.events import (
    Edit,
    Observer,
    Scoped,
    SteeringEvent,
    TokenStatistics,
    token_statistics,
)
from .tuner.layer import FSRLLayer
from .tuner.model import find_used_config

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "ForwardRecord",
    "SteeringEvent",
    "SteeringMonitor",
    "TokenStatistics",
    "ablate_features",
    "adapter_configs",
    "base_model",
    "edit_steering",
    "fsrl_layers",
    "observe",
    "only_features",
    "scale_steering",
    "token_statistics",
    "top_k_steering",
]


@dataclass
class ForwardRecord:
    """One forward pass of the base model with its adapters active.

    Attributes:
        mask: the 2-d ``attention_mask`` of the pass, shape ``(batch, seq)``, or None where the
            caller gave none and every token counts.
        training: the pass was made in training mode with gradients on.
        tokens: one entry per adapter that acted.
    """

    mask: Float[Tensor, "batch seq"] | None
    training: bool
    tokens: list[TokenStatistics] = field(default_factory=list)


def fsrl_layers(model: nn.Module) -> dict[str, FSRLLayer]:
    """The steering layers of a model by the path of the module that each wraps.

    Raises:
        ValueError: if the model has none.
    """
    layers = {m.layer_name: m for m in model.modules() if isinstance(m, FSRLLayer)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no FSRL adapter. Make one with "
            "`get_peft_model(model, FSRLConfig(...))` or load one with `PeftModel.from_pretrained`."
        )
    return layers


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    inner = get_base_model() if callable(get_base_model) else model
    assert isinstance(inner, nn.Module)
    return inner


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """The ``FSRLConfig`` of each adapter by name, with the identity of its SAE.

    Coefficients are those of ``model.peft_config``, which may be changed at any time; what decides
    what the weights mean is as the layers use it. Changing what is returned changes nothing.
    """
    configs: dict[str, Any] = getattr(base_model(model), "peft_config", {})
    found = {}
    for name, config in configs.items():
        used = find_used_config(model, name)
        if used is not None:
            found[name] = config.as_used(used)
    return found


@contextmanager
def observe(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call ``observer`` with a ``SteeringEvent`` after every application of an adapter.

    Args:
        model: a model with FSRL adapters.
        observer: must not modify what it is given. A steering vector has shape
            ``(batch, seq, d_sae)``: reduce it at once rather than keeping it.
    """
    places = [layer.observers for layer in fsrl_layers(model).values()]
    with Scoped(observer, *places):
        yield


@contextmanager
def edit_steering(model: nn.Module, edit: Edit, layer_name: str | None = None) -> Iterator[None]:
    """Apply ``edit`` to every steering vector before it acts; observers see the result.

    Args:
        model: a model with FSRL adapters.
        edit: maps a steering vector of shape ``(batch, seq, n_features)`` and the SAE, whose
            ``feature_index`` says which features these are, to a vector of the same shape.
        layer_name: only at this wrapped module; None for all.

    Raises:
        ValueError: if no adapter wraps ``layer_name``.
    """
    layers = fsrl_layers(model)
    if layer_name is not None and layer_name not in layers:
        raise ValueError(f"No FSRL adapter wraps {layer_name!r}; found {sorted(layers)}.")
    places = [layer.edits for name, layer in layers.items() if layer_name in (None, name)]
    with Scoped(edit, *places):
        yield


@contextmanager
def ablate_features(
    model: nn.Module, features: Iterable[int], layer_name: str | None = None
) -> Iterator[None]:
    """Zero the steering of some features; the others steer as before.

    Args:
        model: a model with FSRL adapters.
        features: feature indices.
        layer_name: only at this wrapped module; None for all.

    Raises:
        IndexError: for an index that the SAE does not have.
    """
    with scale_steering(model, 0.0, layer_name, features):
        yield


@contextmanager
def only_features(
    model: nn.Module, features: Iterable[int], layer_name: str | None = None
) -> Iterator[None]:
    """Zero the steering of all but some features.

    Args:
        model: a model with FSRL adapters.
        features: feature indices.
        layer_name: only at this wrapped module; None for all.

    Raises:
        IndexError: for an index that the SAE does not have.
    """
    chosen = _check_features(model, features, layer_name)

    def keep(v: Tensor, sae: FrozenSAE) -> Tensor:
        mask = torch.zeros(v.shape[-1], dtype=torch.bool, device=v.device)
        mask[sae.positions(chosen).to(v.device)] = True
        return torch.where(mask, v, torch.zeros_like(v))

    with edit_steering(model, keep, layer_name):
        yield


@contextmanager
def scale_steering(
    model: nn.Module,
    scale: float,
    layer_name: str | None = None,
    features: Iterable[int] | None = None,
) -> Iterator[None]:
    """Multiply every steering vector by ``scale``: 0 is the base model, 1 the trained adapter.

    Args:
        model: a model with FSRL adapters.
        scale: any finite number.
        layer_name: only at this wrapped module; None for all.
        features: only the entries of these features; None for all.

    Raises:
        IndexError: for an index that the SAE does not have.
    """
    chosen = None if features is None else _check_features(model, features, layer_name)

    def rescale(v: Tensor, sae: FrozenSAE) -> Tensor:
        # Zero means the base model, whatever the adapter computes, inf and nan included.
        scaled = v * scale if scale else torch.zeros_like(v)
        if chosen is None:
            return scaled
        places = sae.positions(chosen).to(v.device)
        return v.index_copy(-1, places, scaled.index_select(-1, places))

    with edit_steering(model, rescale, layer_name):
        yield


@contextmanager
def top_k_steering(
    model: nn.Module, k: int | float, layer_name: str | None = None
) -> Iterator[None]:
    """Keep, at every token, only the features with the largest ``|v|``.

    Args:
        model: a model with FSRL adapters.
        k: a number of features (an integer), or a share of the SAE's features above 0 and up to 1
            (a float), rounded up.
        layer_name: only at this wrapped module; None for all.

    Raises:
        ValueError: for a negative number, or a share out of range.
    """
    if k < 0 or (isinstance(k, float) and not 0 < k <= 1):
        raise ValueError(f"Expected an integer of 0 or more, or a share in (0, 1], got {k!r}.")

    def keep_largest(v: Tensor, sae: FrozenSAE) -> Tensor:
        n = math.ceil(k * sae.info.d_sae) if isinstance(k, float) else k
        if n >= v.shape[-1]:
            return v
        top = v.abs().topk(n, dim=-1).indices
        return torch.zeros_like(v).scatter(-1, top, v.gather(-1, top))

    with edit_steering(model, keep_largest, layer_name):
        yield


class SteeringMonitor:
    """Collects ``ForwardRecord``s of a model until it is closed.

    The layer gives steering vectors; the base model's forward gives the attention mask, which
    layers do not receive in a usable form. Hooks sit on the base model itself, because PEFT calls
    it directly under some task types.

    Args:
        model: a model with FSRL adapters.
        consume: called with the record of each forward pass in which an adapter acted.

    Attributes:
        missed: the wrapped module that steered with gradients on outside of the base model's
            forward, as where a caller goes to the decoder inside: of that there is no record.
    """

    def __init__(self, model: nn.Module, consume: Callable[[ForwardRecord], None]) -> None:
        self._consume = consume
        self.missed: str | None = None
        self._record: ForwardRecord | None = None
        inner = base_model(model)
        self._signature = inspect.signature(inner.forward)
        self._hooks = [
            inner.register_forward_pre_hook(self._before, with_kwargs=True),
            inner.register_forward_hook(self._after),
        ]
        places = [layer.statistics_observers for layer in fsrl_layers(model).values()]
        self._attached = Scoped(self._observe, *places).__enter__()

    @property
    def current(self) -> ForwardRecord | None:
        """The record of the forward pass that is being made, if one is."""
        return self._record

    def close(self) -> None:
        """Stop collecting and remove every hook; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._attached.__exit__()

    def __enter__(self) -> SteeringMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._attached.is_open:
            return
        mask = self._signature.bind_partial(*args, **kwargs).arguments.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = None
        self._record = ForwardRecord(mask, module.training and torch.is_grad_enabled())

    def _observe(self, statistics: TokenStatistics) -> None:
        if self._record is not None:
            self._record.tokens.append(statistics)
        elif statistics.l1.requires_grad:
            self.missed = statistics.layer_name

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._attached.is_open:
            return
        record, self._record = self._record, None
        if record is None or not record.tokens:
            return
        if record.mask is not None:
            # A forward that continues from a cache has a mask for the whole sequence.
            record.mask = record.mask[:, -record.tokens[0].l1.shape[-1] :]
        self._consume(record)


def _check_features(model: nn.Module, features: Iterable[int], layer_name: str | None) -> list[int]:
    chosen = sorted({int(feature) for feature in features})
    for name, layer in fsrl_layers(model).items():
        if layer_name in (None, name):
            for adapter_name in layer.active_adapters:
                if adapter_name in layer.fsrl_sae:
                    layer.fsrl_sae[adapter_name].positions(chosen)
    return chosen
