"""Batches of token ids: what may be given, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..training.running import to_device

if TYPE_CHECKING:
    from jaxtyping import Bool

Batches = Iterable[Mapping[str, Any]]


def check_batches(data: Batches) -> Batches:
    """Refuse what can be read only once, or not at all.

    Raises:
        TypeError: for an iterator, or one batch in place of several.
    """
    if isinstance(data, Mapping) or not isinstance(data, Iterable) or iter(data) is data:
        raise TypeError(
            "Expected batches that can be read several times, such as a list of mappings with "
            f"`input_ids` and `attention_mask` or a DataLoader; got {type(data).__name__}."
        )
    return data


def check_inputs(inputs: Any) -> Mapping[str, Any]:
    """Refuse what a model's forward would not take by name.

    Raises:
        TypeError: for anything but a mapping whose ``input_ids`` are a tensor.
        ValueError: for ids without a batch dimension.
    """
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), Tensor):
        ids = (
            inputs["input_ids"] if isinstance(inputs, Mapping) and "input_ids" in inputs else inputs
        )
        raise TypeError(
            "Expected a mapping with `input_ids`, a tensor of shape (batch, seq), as a tokenizer "
            f"gives with return_tensors='pt'; got {type(ids).__name__}. Make a list of ids "
            "a tensor: torch.tensor([ids])."
        )
    shape = tuple(inputs["input_ids"].shape)
    if len(shape) < 2:
        raise ValueError(f"Expected `input_ids` of shape (batch, seq), got {shape}. Use ids[None].")
    return inputs


def model_inputs(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch on the model's device, without labels: no loss is computed here."""
    return to_device({k: v for k, v in check_inputs(batch).items() if k != "labels"}, model)


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
