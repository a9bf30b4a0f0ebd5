"""No autograd below the lowest adapter that trains, where nothing needs a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..steering import base_model
from ..tuner.layer import FSRLLayer
from ..tuner.placement import decoder_layers


@contextmanager
def without_prefix_graph(model: nn.Module) -> Iterator[bool]:
    """Run forward passes without a graph up to the lowest decoder layer whose adapter trains.

    A trainer that checkpoints gradients makes the embeddings' output require one, and every frozen
    layer below the first adapter is then recomputed and differentiated for nothing. Inside this
    block the first decoder layer gets its input detached; a checkpointed layer whose inputs need
    no gradient is not recomputed. It changes no gradient that anybody asked for: nothing is cut
    where a parameter trains in or below the layer that is steered, or where ``inputs_embeds`` needs
    a gradient. A reentrant checkpoint complains of inputs without gradients: do not cut there.

    Args:
        model: a model with FSRL adapters.

    Yields:
        Whether passes from token ids are cut.
    """
    inner = base_model(model)
    first = _first_of_frozen_layers(inner)
    if first is None:
        yield False
        return
    is_cut = False

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal is_cut
        inputs = (*args, *kwargs.values())
        is_cut = torch.is_grad_enabled() and not any(_needs_gradient(value) for value in inputs)

    def cut(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return (_detach(args), _detach(kwargs)) if is_cut else None

    hooks = [
        inner.register_forward_pre_hook(look, with_kwargs=True),
        first.register_forward_pre_hook(cut, with_kwargs=True),
    ]
    try:
        yield True
    finally:
        for hook in hooks:
            hook.remove()


def _first_of_frozen_layers(inner: nn.Module) -> nn.Module | None:
    """The first decoder layer, if nothing trains up to the lowest that is steered and trains."""
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return None
    try:
        paths = decoder_layers(inner)
    except ValueError:
        return None
    stack = [inner.get_submodule(paths[index]) for index in sorted(paths)]
    inside = {id(parameter) for layer in stack for parameter in layer.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in inner.parameters()):
        return None
    for layer in stack:
        wrapped = layer.base_layer if isinstance(layer, FSRLLayer) else layer
        if _any_trains(wrapped.parameters()):
            return None
        if isinstance(layer, FSRLLayer) and _any_trains(layer.fsrl_adapter.parameters()):
            return stack[0]
    return None


def _any_trains(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _detach(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, dict):
        return {key: _detach(each) for key, each in value.items()}
    if type(value) is tuple:
        return tuple(_detach(each) for each in value)
    return value
