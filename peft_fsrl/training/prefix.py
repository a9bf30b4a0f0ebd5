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

# Of transformers' decoder layers.
_FLAG = "gradient_checkpointing"


@contextmanager
def without_prefix_graph(model: nn.Module) -> Iterator[bool]:
    """Run forward passes without a graph up to the lowest decoder layer whose adapter trains.

    A trainer that checkpoints gradients makes the embeddings' output require one, and every frozen
    layer below the first adapter is then recomputed and differentiated for nothing. Inside this
    block the first decoder layer gets its input detached, and the frozen layers are not
    checkpointed. It changes no gradient that anybody asked for: nothing is cut where a parameter
    trains in or below the layer that is steered, or where ``inputs_embeds`` needs a gradient.

    Args:
        model: a model with FSRL adapters.

    Yields:
        Whether passes from token ids are cut.
    """
    inner = base_model(model)
    frozen = _frozen_layers(inner)
    if not frozen:
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
        frozen[0].register_forward_pre_hook(cut, with_kwargs=True),
    ]
    checkpointed = [each for each in map(_wrapped, frozen) if _is_checkpointed(each)]
    steering = frozen[-1]
    assert isinstance(steering, FSRLLayer)
    for layer in checkpointed:
        setattr(layer, _FLAG, False)
    steering.recomputes_alone = steering.base_layer in checkpointed
    try:
        yield True
    finally:
        steering.recomputes_alone = False
        for layer in checkpointed:
            setattr(layer, _FLAG, True)
        for hook in hooks:
            hook.remove()


def _frozen_layers(inner: nn.Module) -> list[nn.Module]:
    """The decoder layers up to the lowest one whose adapter trains; none where more trains."""
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return []
    try:
        paths = decoder_layers(inner)
    except ValueError:
        return []
    stack = [inner.get_submodule(paths[index]) for index in sorted(paths)]
    inside = {id(parameter) for layer in stack for parameter in layer.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in inner.parameters()):
        return []
    for index, layer in enumerate(stack):
        if _any_trains(_wrapped(layer).parameters()):
            return []
        if isinstance(layer, FSRLLayer) and _any_trains(layer.fsrl_adapter.parameters()):
            return stack[: index + 1]
    return []


def _wrapped(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, FSRLLayer) else layer


def _any_trains(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def _is_checkpointed(layer: nn.Module) -> bool:
    return bool(getattr(layer, _FLAG, False))


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
