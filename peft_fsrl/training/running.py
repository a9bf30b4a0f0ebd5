"""Run models without side effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..steering import adapter_configs, scale_steering
from ..tuner.outputs import hidden_states_of, replace_hidden_states

if TYPE_CHECKING:
    from jaxtyping import Float


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each model's mode is restored."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """The base model: FSRL adapters steer nothing, and what they train beside is the base's own.

    Unlike ``disable_adapter`` this leaves other adapters as they are (the base of an adapter on top
    of LoRA is the model with LoRA), and the flags of the parameters too.

    Raises:
        ValueError: if the model has no FSRL adapter.
    """
    with ExitStack() as stack:
        stack.enter_context(scale_steering(model, 0.0))
        for module in trained_modules(model).values():
            module.enable_adapters(False)
            stack.callback(module.enable_adapters, True)
        yield


def trained_modules(model: nn.Module) -> dict[str, AuxiliaryTrainingWrapper]:
    """The ``modules_to_save`` of active FSRL adapters by their path."""
    names = set(adapter_configs(model))
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        and not module.disable_adapters
        and names & set(module.active_adapters)
    }


@contextmanager
def on_output(
    module: nn.Module, act: Callable[[Tensor, Tensor], Float[Tensor, "*batch d"] | None]
) -> Iterator[None]:
    """Call ``act`` with a module's input and output; what it returns takes the output's place.

    It comes last on the module, so the output has been steered if an adapter steers it.
    """

    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        changed = act(given, hidden_states_of(output))
        return None if changed is None else replace_hidden_states(output, changed)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def to_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch with its tensors on the model's device."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
