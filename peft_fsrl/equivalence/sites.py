"""Where in a model a LoRA can stand in for a steered layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..steering import SteeringEvent, base_model, fsrl_layers, observe
from ..training.running import evaluating
from ..tuner.layer import FSRLLayer
from ..tuner.outputs import hidden_states_of, replace_hidden_states
from .capture import model_inputs, on_output, real_tokens

PROJECTION = "residual_projection"
_MLPS = ("mlp", "feed_forward", "ffn")


@dataclass(frozen=True, eq=False)
class Site:
    """Where a LoRA stands in for one steered layer.

    Attributes:
        layer: the steered layer.
        module: the module that is changed: a linear layer, or the steered one for a projection.
        path: path of the linear layer in the base model without adapters.
        projects: the LoRA reads the module's output and not its input.
    """

    layer: FSRLLayer
    module: nn.Module
    path: str
    projects: bool

    def reads(self, given: Tensor, output: Tensor) -> Tensor:
        """What the LoRA reads: the module's input, or its output."""
        return output if self.projects else given


def insert_projection(model: nn.Module, layer_name: str) -> str:
    """Put an identity ``nn.Linear`` behind a module, for a LoRA to sit on; outputs do not change.

    The module gets a child ``residual_projection``, through which its output goes. No other path
    changes, so checkpoints still fit.

    Args:
        model: the base model, without adapters.
        layer_name: path of the module whose output is the residual stream.

    Returns:
        Path of the projection.
    """
    layer = model.get_submodule(layer_name)
    if hasattr(layer, PROJECTION):
        return f"{layer_name}.{PROJECTION}"
    parameter = next(layer.parameters())
    width = _width(model, layer_name)
    projection = nn.Linear(width, width, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad():
        nn.init.eye_(projection.weight)
        nn.init.zeros_(projection.bias)
    layer.add_module(PROJECTION, projection.requires_grad_(False))

    def project(module: nn.Module, args: Any, output: Any) -> Any:
        # Looked up at every call: PEFT puts its own layer in the projection's place.
        through = getattr(module, PROJECTION)
        return replace_hidden_states(output, through(hidden_states_of(output)))

    layer.register_forward_hook(project)
    return f"{layer_name}.{PROJECTION}"


def _width(model: nn.Module, layer_name: str) -> int:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError(f"Cannot tell the width of '{layer_name}': the model has no hidden_size.")
    return int(width)


def resolve_sites(model: nn.Module, target: str | None) -> tuple[Site, ...]:
    """One site for each steered layer; see ``export.fit_single_lora`` for ``target``."""
    steered = [layer for layer in fsrl_layers(model).values() if _acts(layer)]
    if not steered:
        raise ValueError("No adapter is active. Activate one, and leave `disable_adapter`.")
    return tuple(_resolve_site(layer, target) for layer in steered)


def _acts(layer: FSRLLayer) -> bool:
    active = any(name in layer.fsrl_adapter for name in layer.active_adapters)
    return active and not layer.disable_adapters


def _resolve_site(layer: FSRLLayer, target: str | None) -> Site:
    module = layer.base_layer
    if target == "projection":
        return Site(layer, module, f"{layer.layer_name}.{PROJECTION}", projects=True)
    if isinstance(module, (nn.Linear, Conv1D)) and target is None:
        return Site(layer, module, layer.layer_name, projects=False)
    linears = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    if target is None:
        inside = [name for name in linears if name.split(".")[0] in _MLPS]
        target = inside[-1] if inside else None
    if target is None or target not in linears:
        lost = "tell which" if target is None else "find the"
        which = "" if target is None else f" {target!r}"
        raise ValueError(
            f"Cannot {lost} linear layer{which} in '{layer.layer_name}' is to carry the LoRA; "
            f"found {sorted(linears)}. Name one as `target`, or use target='projection'."
        )
    return Site(layer, linears[target], f"{layer.layer_name}.{target}", projects=False)


def check_writer(model: nn.Module, site: Site, batch: Any) -> None:
    """Make sure that what is added to the module's output is added to the steered layer's."""
    if site.projects or site.module is site.layer.base_layer:
        return
    seen: list[Tensor] = []
    probe: list[Tensor] = []
    inner = base_model(model)

    def nudge(_given: Tensor, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        # As large as what it is added to, in which the rounding of narrow dtypes would hide it.
        size = seen[0].std(dim=-1, keepdim=True).to(output.device)
        step = (torch.randn(output.shape, generator=generator).to(size) * size).to(output)
        probe.append(step)
        return output + step

    def keep(event: SteeringEvent) -> None:
        if event.layer_name == site.layer.layer_name:
            seen.append(event.hidden_states.double())

    with evaluating(model), observe(model, keep):
        inner(**model_inputs(batch, inner))
        with on_output(site.module, nudge):
            inner(**model_inputs(batch, inner))
    mask = real_tokens(batch).to(seen[0].device)
    change, wanted = (seen[1] - seen[0])[mask], probe[0].double()[mask]
    error = float((change - wanted).norm() / wanted.norm())
    if error > 0.05:
        raise ValueError(
            f"'{site.path}' does not write to the output of '{site.layer.layer_name}' unchanged: "
            f"what is added to it comes out {error:.0%} different, as behind a norm. Name another "
            "linear layer as `target`, or use target='projection'."
        )
