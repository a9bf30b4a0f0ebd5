"""Thresholds in an optimiser: a learning rate of their own, no decay, never below zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..steering import adapter_configs

_SUFFIXES = (".threshold", ".log_threshold")
# Marks an optimizer's groups that are kept at zero or more; saved with its state.
_NON_NEGATIVE = "fsrl_non_negative"


def group_thresholds(optimizer: Any, model: nn.Module, *, own: bool, scheduled: bool) -> None:
    """Give thresholds the learning rate that each adapter's config asks for, and keep them valid.

    A threshold moves to a group of its own with all the settings of the one that it was in, but for
    ``threshold_lr_multiplier`` times its learning rate and, unless the user made the groups, no
    weight decay, which would pull thresholds to zero, away from sparsity. Thresholds of
    ``soft_threshold`` are projected to zero or more after every step: a negative one acts as zero.
    Groups that were made here before, as by an earlier ``train()``, stay as they are.

    Args:
        optimizer: with the parameters of ``model``.
        model: a model with FSRL adapters.
        own: the trainer made the optimizer; False if the user did.
        scheduled: the user also made a scheduler, for the groups as they are.

    Raises:
        ValueError: a multiplier other than 1 with a scheduler that would not know the new groups.
    """
    # accelerate's wrapper has an optimizer's methods, but nothing that its hooks could be kept in.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for adapter_name, config in adapter_configs(model).items():
        thresholds = [
            parameter
            for name, parameter in model.named_parameters()
            if name.endswith(tuple(f".{adapter_name}{suffix}" for suffix in _SUFFIXES))
            and parameter.requires_grad
        ]
        multiplier = config.threshold_lr_multiplier
        is_soft = config.activation == "soft_threshold"
        changes: dict[str, Any] = {"weight_decay": 0.0} if own else {}
        if thresholds and multiplier != 1.0 and scheduled:
            raise ValueError(
                f"threshold_lr_multiplier={multiplier} needs an optimizer group for the "
                "thresholds, but the scheduler that was passed was made for the groups as they "
                "are. Pass `optimizers=(optimizer, None)`, or give the thresholds their own group "
                "and learning rate yourself and leave the multiplier at 1."
            )
        if own or multiplier != 1.0 or (is_soft and not scheduled):
            changes[_NON_NEGATIVE] = is_soft
            _split_groups(optimizer, thresholds, multiplier, changes)
        elif is_soft:
            _keep_non_negative(optimizer, thresholds)
    if hasattr(optimizer, "register_step_post_hook"):
        optimizer.register_step_post_hook(_project)


def _split_groups(
    optimizer: Any, parameters: list[nn.Parameter], multiplier: float, changes: dict[str, Any]
) -> None:
    wanted = {id(parameter) for parameter in parameters}
    split = []
    for group in optimizer.param_groups:
        moved = [p for p in group["params"] if id(p) in wanted]
        if not moved or _NON_NEGATIVE in group:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in wanted]
        # Where a scheduler has seen the group, it is from `initial_lr` that the next one starts.
        rates = {key: group[key] * multiplier for key in ("lr", "initial_lr") if key in group}
        split.append({**group, "params": moved, **rates, **changes})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for settings in split:
        optimizer.add_param_group(settings)


def _project(optimizer: Any, *_: Any) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            if group.get(_NON_NEGATIVE):
                # Looked up at every step: FSDP and ZeRO put shards in the place of parameters.
                for threshold in group["params"]:
                    threshold.clamp_(min=0)


def _keep_non_negative(optimizer: Any, thresholds: list[nn.Parameter]) -> None:
    def project(*_: Any) -> None:
        with torch.no_grad():
            for threshold in thresholds:
                threshold.clamp_(min=0)

    if thresholds and hasattr(optimizer, "register_step_post_hook"):
        optimizer.register_step_post_hook(project)
