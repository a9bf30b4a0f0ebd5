"""Thresholds in an optimizer: a learning rate of their own, and no weight decay; gains' bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..steering import adapter_configs, fsrl_layers
from ..tuner.adapter import SteeringAdapter

_SUFFIXES = (".threshold", ".log_threshold")
# Marks the groups made here; saved with the optimizer's state.
_MARK = "fsrl_thresholds"


def group_thresholds(optimizer: Any, model: nn.Module, *, own: bool, scheduled: bool) -> None:
    """Give thresholds the learning rate that each adapter's config asks for.

    A threshold moves to a group of its own with all the settings of the one that it was in, but for
    ``threshold_lr_multiplier`` times its learning rate and, unless the user made the groups, no
    weight decay, which would pull thresholds to zero, away from sparsity. Groups that were made
    here before, as by an earlier ``train()``, stay as they are. Nothing keeps a threshold of
    ``soft_threshold`` from falling below zero, where it acts as zero.

    Args:
        optimizer: with the parameters of ``model``.
        model: a model with FSRL adapters.
        own: the trainer made the optimizer; False if the user did.
        scheduled: the user also made a scheduler, for the groups as they are.

    Raises:
        ValueError: a multiplier other than 1 with a scheduler that would not know the new groups.
    """
    for adapter_name, config in adapter_configs(model).items():
        multiplier = config.threshold_lr_multiplier
        names = tuple(f".{adapter_name}{suffix}" for suffix in _SUFFIXES)
        thresholds = [
            parameter
            for name, parameter in model.named_parameters()
            if name.endswith(names) and parameter.requires_grad
        ]
        if not thresholds or (multiplier == 1.0 and not own):
            continue
        if multiplier != 1.0 and scheduled:
            raise ValueError(
                f"threshold_lr_multiplier={multiplier} needs an optimizer group for the "
                "thresholds, but the scheduler that you passed was made for the existing groups. "
                "Pass `optimizers=(optimizer, None)`, or give the thresholds their own group and "
                "learning rate yourself and leave the multiplier at 1."
            )
        changes = {"weight_decay": 0.0, _MARK: True} if own else {_MARK: True}
        _split_groups(optimizer, thresholds, multiplier, changes)


@torch.no_grad()
def bound_gains(model: nn.Module) -> None:
    """Raise every gain to its adapter's ``min_gain``. The trainers do this after every step.

    Args:
        model: a model with FSRL adapters.
    """
    for layer in fsrl_layers(model).values():
        for adapter in layer.fsrl_adapter.values():
            assert isinstance(adapter, SteeringAdapter)
            if adapter.min_gain is not None:
                adapter.gain.clamp_(min=adapter.min_gain)


def _split_groups(
    optimizer: Any, parameters: list[nn.Parameter], multiplier: float, changes: dict[str, Any]
) -> None:
    wanted = {id(parameter) for parameter in parameters}
    split = []
    for group in optimizer.param_groups:
        moved = [p for p in group["params"] if id(p) in wanted]
        if not moved or _MARK in group:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in wanted]
        # Where a scheduler has seen the group, it is from `initial_lr` that the next one starts.
        rates = {key: group[key] * multiplier for key in ("lr", "initial_lr") if key in group}
        split.append({**group, "params": moved, **rates, **changes})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for settings in split:
        optimizer.add_param_group(settings)
