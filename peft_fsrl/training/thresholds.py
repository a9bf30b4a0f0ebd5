"""Thresholds and gains in training: their optimizer group, a target l0, a bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..steering import SteeringMonitor, adapter_configs, fsrl_layers
from ..tuner.adapter import SteeringAdapter
from ..tuner.events import Scoped
from ..tuner.layer import FSRLLayer

# Tokens of a batch that are looked at, and the share of a run over which l0 falls to its target.
_TOKENS, _DESCENT = 512, 0.1
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


@contextmanager
def hold_target_l0(
    model: nn.Module, monitor: SteeringMonitor, accelerator: Any, state: Any, share: float = 1.0
) -> Iterator[None]:
    """Shift thresholds in training passes, so that ``target_l0`` features per token are steered.

    Before an adapter steers a batch, all its thresholds at that layer move by one amount: to where
    as many features of the batch's real tokens are steered as its target says. None falls below
    zero. The amount is found in the units of the thresholds, so that nothing here depends on the
    scale of a model's activations. Over the first tenth of a run the number falls to the target
    from all features (never from fewer to more): which of them are worth steering shows only once
    they have been trained.

    Args:
        model: with the adapters; those without a target, or that do not train, are left alone.
        monitor: knows the mask of the pass that is being made.
        accelerator: joins the tokens of several processes.
        state: of the trainer: the step that is made, of how many.
        share: of the way that thresholds go, for one of several batches of a step.
    """
    targets = {n: c.target_l0 for n, c in adapter_configs(model).items() if c.target_l0 is not None}
    progress = state.global_step / max(state.max_steps, 1)
    moved: set[tuple[str, str]] = set()

    @torch.no_grad()
    def move(layer: FSRLLayer, name: str, x: Tensor) -> None:
        adapter, sae, record = layer.fsrl_adapter[name], layer.fsrl_sae[name], monitor.current
        assert isinstance(adapter, SteeringAdapter)
        # Once a batch: what a graph was made of must not change before its backward pass.
        place = layer.layer_name, name
        if name not in targets or place in moved or not adapter.trains:
            return
        if record is None or not record.training:
            return
        moved.add(place)
        real = _real_tokens(x, record.mask, seed=state.global_step)
        u = functional.steering_pre(
            sae.process_in(real), adapter.weight, adapter.bias, adapter.down
        )
        margin = functional.steering_margin(
            u, adapter.threshold_parameter, activation=adapter.activation
        )
        amount = _common_margin(margin, targets[name], progress, accelerator)
        if math.isfinite(amount):
            adapter.raise_thresholds(share * amount)

    places = [layer.controls for layer in fsrl_layers(model).values()] if targets else []
    with Scoped(move, *places):
        yield


def _real_tokens(x: Tensor, mask: Tensor | None, seed: int) -> Tensor:
    """Some real tokens of a batch, drawn by a seed: ``(tokens, d_in)``."""
    real = x.flatten(0, -2) if mask is None else x[mask[:, -x.shape[-2] :].to(x.device) > 0]
    if len(real) <= _TOKENS:
        return real
    # Not evenly spaced: in rows of one length that would be the same positions of each.
    drawn = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:_TOKENS]
    return real[drawn.to(real.device)]


def _common_margin(margin: Tensor, target: float, progress: float, accelerator: Any) -> float:
    """The margin that the wanted number of entries per row exceed, over the rows of all processes.

    Half-way between the last of those and the next; infinite where there is none, 0 where the
    number is right.
    """
    ones = margin.new_tensor([(margin > 0).sum(), len(margin)])
    steered, rows = accelerator.reduce(ones, "sum").tolist()
    most = target * max(1.0, margin.shape[-1] / target) ** max(0.0, 1 - progress / _DESCENT)
    if target * rows <= steered <= most * rows:
        return 0.0
    n = round((most if steered > most * rows else target) * rows) + 1
    largest = margin.new_full((n,), -math.inf)
    own = margin.flatten().topk(min(n, margin.numel()), sorted=False).values
    largest[: len(own)] = own
    return float(accelerator.gather(largest).topk(n).values[-2:].mean())
