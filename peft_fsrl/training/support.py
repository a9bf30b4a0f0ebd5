"""What a trainer must be for the penalty to be right; what is not, is refused before training."""

from __future__ import annotations

import inspect
import os
from typing import Any

import transformers
from torch import nn
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from ..steering import adapter_configs, base_model, fsrl_layers

# Older transformers wrap a layer's call in a checkpoint, newer ones its forward, without its hooks.
CHECKPOINTS_HOOKS = "__call__" in vars(GradientCheckpointingLayer)


def require_compute_loss(trainer_class: type[Trainer]) -> None:
    """Refuse a trainer whose training step does not go through ``compute_loss``.

    Raises:
        TypeError: naming the class whose ``training_step`` replaces the stock one.
    """
    for owner in trainer_class.__mro__:
        if owner is Trainer:
            return
        step = vars(owner).get("training_step")
        if step is None:
            continue
        names = inspect.unwrap(step).__code__.co_names
        if "compute_loss" in names:
            return
        if "training_step" not in names:
            raise TypeError(
                f"{owner.__name__}.training_step makes its loss without `compute_loss`, where the "
                "FSRL penalty is added. Train with one of CPOTrainer, DPOTrainer, KTOTrainer, "
                "ORPOTrainer, SFTTrainer, GRPOTrainer, RLOOTrainer or Trainer, or set "
                "l1_coeff=0 and use the trainer as it is."
            )


def require_support(trainer: Trainer) -> None:
    """Refuse settings under which the penalty or its statistics would be wrong.

    Raises:
        ValueError: no FSRL adapter; gradient checkpointing that would lose the penalty; several
            GPUs in one process; sequences that are joined without a mask; processes that were
            launched together but do not know of each other.
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
    if args.gradient_checkpointing:
        _require_penalty_outside_checkpoints(model, args.gradient_checkpointing_kwargs or {})
    if getattr(trainer, "padding_free", False):
        sequence = [n for n, c in adapter_configs(model).items() if c.penalty_reduction != "token"]
        if sequence:
            raise ValueError(
                "Without padding, sequences are joined into one row and the penalty cannot tell "
                f"them apart, but adapter '{sequence[0]}' takes its mean by sequence. Set "
                "padding_free=False and packing=False, or penalty_reduction='token'."
            )


def _require_one_job(world_size: int) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 < started and "LOCAL_RANK" in os.environ:
        raise ValueError(
            f"Expected to train with the {started} processes that were launched, found that each "
            "would train alone and write over the others' files. Without a GPU, set `use_cpu=True` "
            "(`--use_cpu true`)."
        )


def _require_penalty_outside_checkpoints(model: nn.Module, settings: dict[str, Any]) -> None:
    if CHECKPOINTS_HOOKS:
        raise ValueError(
            f"transformers {transformers.__version__} recomputes a layer's hooks with the "
            "layer, and the penalty would not survive that. Set gradient_checkpointing=False, "
            "or install transformers 5.23 or newer (Python 3.11)."
        )
    if not settings.get("use_reentrant"):
        return
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
