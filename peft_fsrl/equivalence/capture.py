"""Run models over batches and see, token by token, what goes in and out of their modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..training.running import to_device
from ..tuner.outputs import hidden_states_of, replace_hidden_states

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Batches = Iterable[Mapping[str, Any]]


def check_batches(data: Batches) -> Batches:
    """Refuse what can be read only once, or not at all.

    Raises:
        TypeError: for an iterator, or one batch in place of several.
    """
    if isinstance(data, Mapping) or iter(data) is data:
        raise TypeError(
            "Expected batches that can be read several times, such as a list of mappings with "
            f"`input_ids` and `attention_mask` or a DataLoader; got {type(data).__name__}."
        )
    return data


def model_inputs(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch on the model's device, without labels: no loss is computed here.

    Raises:
        TypeError: for a batch that is not a mapping with ``input_ids``.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TypeError("Expected each batch to be a mapping with `input_ids`.")
    return to_device({k: v for k, v in batch.items() if k != "labels"}, model)


def real_tokens(batch: Mapping[str, Any]) -> Bool[Tensor, "batch seq"]:
    """Which tokens of a batch are no padding, on the CPU."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(batch["input_ids"].shape, dtype=torch.bool)
    real: Tensor = mask.cpu() > 0
    return real


def scored_tokens(batch: Mapping[str, Any]) -> Bool[Tensor, "batch seq"]:
    """Which tokens are predicted and judged: those with a label, or all real ones.

    Never the first of a sequence, which nothing predicts, nor the first behind padding.
    """
    real = real_tokens(batch)
    scored = real.clone()
    if batch.get("labels") is not None:
        scored &= batch["labels"].cpu() != -100
    scored[:, 0] = False
    scored[:, 1:] &= real[:, :-1]
    return scored


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
