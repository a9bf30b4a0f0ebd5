"""Settings under which the penalty would be wrong, refused before training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from ..steering import adapter_configs, base_model, fsrl_layers
from ..tuner.layer import FSRLLayer


def require_support(trainer: Trainer) -> None:
    """Refuse settings under which the penalty or its statistics would be wrong.

    Raises:
        ValueError: no FSRL adapter; gradient checkpointing that would lose the penalty; several
            GPUs in one process; sequences that are joined without a mask; an encoder-decoder;
            processes that were launched together but do not know of each other; a bound of gains
            that DeepSpeed would not hold; a target_l0 under FSDP or DeepSpeed.
    """
    model, args = trainer.model, trainer.args
    _require_one_job(args.world_size)
    assert isinstance(model, nn.Module)
    fsrl_layers(model)
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would run in torch.nn.DataParallel, whose replicas "
            "share the original's hooks. Start one process per GPU with `accelerate launch`, or "
            "set CUDA_VISIBLE_DEVICES to one of them."
        )
    bounded = any(config.min_gain is not None for config in adapter_configs(model).values())
    if bounded and trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed steps on its own copy of the parameters, which `min_gain` cannot bound. "
            "Train with DDP or FSDP2, or leave `min_gain` out."
        )
    targeted = any(config.target_l0 is not None for config in adapter_configs(model).values())
    if targeted and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "`target_l0` moves thresholds in place; FSDP and DeepSpeed train copies of them that "
            "would not follow. Train with DDP or in one process, or set `l1_coeff` instead."
        )
    if reentrant(args):
        _require_penalty_outside_checkpoints(model)
    if getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base_model(model)).__name__} is an encoder-decoder: its attention mask says "
            "which of the encoder's tokens are real, not which of the decoder's, and the penalty "
            "would count padding. Train a decoder-only model, or set l1_coeff, l2_coeff and "
            "l0_coeff to 0 and use the trainer as it is."
        )
    if getattr(trainer, "padding_free", False) or getattr(args, "packing", False):
        require_reduction_by_token(model)


def reentrant(args: Any) -> bool:
    """Whether gradient checkpoints, if there are any, are reentrant."""
    return bool((args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False))


def require_reduction_by_token(model: nn.Module) -> None:
    """Refuse sequences that are joined into one row where the penalty takes its mean by sequence.

    Raises:
        ValueError: naming the adapter.
    """
    for name, config in adapter_configs(model).items():
        if config.penalty_reduction != "token":
            raise ValueError(
                "Sequences are joined into one row and the penalty cannot tell them apart, but "
                f"adapter '{name}' takes its mean by sequence. Set padding_free=False and "
                "packing=False, take a collator that pads, or set penalty_reduction='token'."
            )


@contextmanager
def require_real_tokens(model: nn.Module) -> Iterator[None]:
    """Refuse forward passes that do not say which tokens are real, or where a sequence ends.

    Raises:
        ValueError: at the pass, for an attention mask that is not two-dimensional, or for positions
            that start again within a row that has no mask.
    """

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
            raise ValueError(
                f"Expected an `attention_mask` of shape (batch, seq), found {found}: it does not "
                "say which tokens are padding, and the penalty would count them. Pass the "
                "two-dimensional mask, or set l1_coeff, l2_coeff and l0_coeff to 0 and use the "
                "trainer as it is."
            )
        # Of several axes are the positions of images and videos.
        if mask is None and isinstance(positions, Tensor) and positions.dim() == 2:
            starts_again = (positions[:, 1:] <= positions[:, :-1]).any()
            if starts_again:
                require_reduction_by_token(model)

    hook = base_model(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class WidePrecision:
    """Keeps FSRL adapters as wide as they are, where TRL narrows what trains.

    On a base model in 4 or 8 bits TRL casts trainable parameters to bfloat16, for LoRA. There a
    threshold that a step moves by less than 0.2 % of its size does not move at all.

    Args:
        model: what the trainer is given; anything but a quantized model is left alone.
    """

    def __init__(self, model: Any) -> None:
        self._kept: dict[str, Tensor] = {}
        if isinstance(model, nn.Module) and _is_quantized(model):
            self._kept = {n: p.detach().to("cpu", copy=True) for n, p in _adapters(model).items()}

    def restore(self, model: nn.Module) -> None:
        """Put back what was narrowed since, and widen what the trainer has made since."""
        if not _is_quantized(model):
            return
        for name, parameter in _adapters(model).items():
            if name in self._kept:
                parameter.data = self._kept[name].to(parameter.device)
            elif parameter.dtype == torch.bfloat16:
                parameter.data = parameter.detach().float()


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{layer.layer_name}.{name}": parameter
        for layer in model.modules()
        if isinstance(layer, FSRLLayer)
        for name, parameter in layer.fsrl_adapter.named_parameters()
    }


def _is_quantized(model: nn.Module) -> bool:
    inner = base_model(model)
    return any(getattr(inner, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))


def _require_one_job(world_size: int) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 < started and "LOCAL_RANK" in os.environ:
        raise ValueError(
            f"Expected to train with the {started} processes that were launched, found that each "
            "would train alone and overwrite the others' files. Without a GPU, set "
            "`use_cpu=True` (`--use_cpu true`)."
        )


def _require_penalty_outside_checkpoints(model: nn.Module) -> None:
    steering = set(fsrl_layers(model).values())
    for name, module in base_model(model).named_modules():
        inside = steering & set(module.modules())
        if isinstance(module, GradientCheckpointingLayer) and inside:
            steered = next(iter(inside)).layer_name
            raise ValueError(
                f"'{steered}' lies inside the reentrant gradient checkpoint of '{name}', where "
                "the penalty would have no gradient. Set gradient_checkpointing_kwargs="
                "{'use_reentrant': False}, or steer whole decoder layers."
            )
