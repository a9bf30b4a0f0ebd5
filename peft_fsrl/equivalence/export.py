"""One LoRA for all inputs: the best of a given rank, and its export for stock PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..steering import SteeringEvent, base_model, fsrl_layers, observe
from ..training.running import evaluating, on_output
from ..tuner.layer import FSRLLayer
from ..tuner.outputs import hidden_states_of, replace_hidden_states
from .batches import Batches, check_batches, model_inputs, real_tokens
from .fidelity import Comparison, measure_fidelity
from .reduced_rank import Moments, ReducedRank, reduced_rank_regression

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


@dataclass(frozen=True, eq=False)
class SingleLoRA:
    """The best affine stand-ins for an adapter, of every rank, one per steered layer.

    Attributes:
        sites: where they stand.
        fits: the regression at each site, of the change of the residual stream on what the LoRA
            there reads.
        adapter_name: the adapter that they stand for.
    """

    sites: tuple[Site, ...]
    fits: tuple[ReducedRank, ...]
    adapter_name: str

    @property
    def max_rank(self) -> int:
        """The largest rank that every site has."""
        return min(fit.max_rank for fit in self.fits)

    def error(self, rank: int) -> float:
        """The share of the squared change that is missed at this rank, over all sites."""
        missed = sum(fit.error(rank) * fit.moments.size for fit in self.fits)
        return missed / sum(fit.moments.size for fit in self.fits)

    @contextmanager
    def applied(self, rank: int) -> Iterator[None]:
        """Add the LoRA of this rank to what the modules compute, beside any steering."""

        def add(site: Site, factors: list[Tensor], given: Tensor, output: Tensor) -> Tensor:
            rows = (output if site.projects else given).float()
            lora_A, lora_B, bias = (factor.to(rows.device) for factor in factors)
            return output + (rows @ lora_A.T @ lora_B.T + bias).to(output.dtype)

        with ExitStack() as stack:
            for site, fit in zip(self.sites, self.fits, strict=True):
                factors = [factor.float() for factor in fit.factors(rank)]
                stack.enter_context(on_output(site.module, partial(add, site, factors)))
            yield

    def stand_ins(
        self, ranks: Sequence[int]
    ) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """Those of several ranks, for ``measure_fidelity``."""
        return {f"LoRA of rank {rank}": partial(self.applied, rank) for rank in ranks}

    def export(self, rank: int) -> tuple[LoraConfig, dict[str, Tensor]]:
        """A LoRA for stock PEFT: config and state dict, as ``save_pretrained`` writes them."""
        state = {}
        has_bias = any(fit.intercept for fit in self.fits)
        for site, fit in zip(self.sites, self.fits, strict=True):
            lora_A, lora_B, bias = (factor.float().contiguous() for factor in fit.factors(rank))
            prefix = f"base_model.model.{site.path}"
            state[f"{prefix}.lora_A.weight"] = lora_A
            state[f"{prefix}.lora_B.weight"] = lora_B
            if has_bias:
                state[f"{prefix}.lora_B.bias"] = bias
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            target_modules=[site.path for site in self.sites],
            lora_bias=has_bias,
            fan_in_fan_out=any(isinstance(site.module, Conv1D) for site in self.sites),
            inference_mode=True,
            task_type="CAUSAL_LM",
        )
        return config, state


def fit_single_lora(
    model: nn.Module,
    data: Batches,
    *,
    target: str | None = None,
    bias: bool = True,
    ridge: float = 0.0,
) -> SingleLoRA:
    """The best affine stand-ins for a model's adapter, by reduced-rank regression over the data.

    Args:
        model: a model with FSRL adapters, one of them active.
        data: batches of ``input_ids`` and ``attention_mask``; many more tokens than the LoRA reads
            numbers. Only second moments are kept. What the LoRA does to other kinds of text is
            decided by nothing: mix in such text where it has to leave it alone.
        target: what carries the LoRA. None: the linear layer that is steered, or, where a decoder
            layer is, the last one of its MLP, which writes to the residual stream.
            ``"projection"``: an identity in the residual stream that ``insert_projection`` puts
            there. Otherwise the path of a linear layer inside the decoder layer, such as
            ``"self_attn.o_proj"``, that writes to the residual stream.
        bias: whether the LoRA has a bias.
        ridge: see ``reduced_rank_regression``.

    Raises:
        TypeError: see ``batches.check_batches``.
        ValueError: if no adapter acts, there is no such linear layer, it does not read each token
            once, or what it writes does not reach the layer's output unchanged.
    """
    sites = _resolve_sites(model, target)
    names: set[str] = set()
    moments = tuple(Moments() for _ in sites)
    reads: dict[int, Tensor] = {}
    x: dict[str, Tensor] = {}
    mask = torch.zeros(0)

    def see(event: SteeringEvent) -> None:
        names.add(event.adapter_name)
        x[event.layer_name] = event.hidden_states

    def read(index: int, given: Tensor, _output: Tensor) -> None:
        if given.shape[:-1] != mask.shape:
            raise ValueError(
                f"Expected '{sites[index].path}' to read one row for each token, "
                f"{tuple(mask.shape)}, found {tuple(given.shape[:-1])}, as in an expert. Use "
                "target='projection'."
            )
        reads[index] = given

    def regress(index: int, _given: Tensor, output: Tensor) -> None:
        own = x.pop(sites[index].layer.layer_name)
        chosen = mask.to(own.device)
        given = own if sites[index].projects else reads.pop(index)
        moments[index].update(given[chosen].double(), (output.double() - own.double())[chosen])

    with evaluating(model), observe(model, see), ExitStack() as stack:
        for index, site in enumerate(sites):
            stack.enter_context(on_output(site.module, partial(read, index)))
            stack.enter_context(on_output(site.layer.base_layer, partial(regress, index)))
        inner = base_model(model)
        for batch in check_batches(data):
            given = model_inputs(batch, inner)
            mask = real_tokens(batch)
            inner(**given)
    if not names:
        raise ValueError("Expected at least one batch, found none.")
    if len(names) != 1:
        raise ValueError(f"Expected one active adapter, found {sorted(names)}. Activate one.")
    for site in sites:
        _check_writer(model, site, next(iter(data)))
    fits = tuple(reduced_rank_regression(m, intercept=bias, ridge=ridge) for m in moments)
    return SingleLoRA(sites, fits, names.pop())


@dataclass(frozen=True, eq=False)
class LoRAExport:
    """A LoRA that stands for an adapter, with what that costs.

    Attributes:
        config: for stock PEFT.
        state_dict: in the form in which PEFT saves it.
        rank: of the LoRA.
        error: share of the squared change of the residual stream that it misses, on the data that
            it was fitted to.
        comparison: loss and divergence of base, FSRL and LoRA, on text of the kind that it was
            fitted to.
        held_out: that text is not the very data of the fit.
        elsewhere: the same on other text, where the adapter may be silent and the LoRA is not; None
            if that was not measured.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor]
    rank: int
    error: float
    comparison: Comparison
    held_out: bool
    elsewhere: Comparison | None

    def save(self, directory: str | Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt"}
        save_file(self.state_dict, Path(directory) / "adapter_model.safetensors", metadata=metadata)
        self.config.save_pretrained(str(directory))

    def __str__(self) -> str:
        where = ", ".join(sorted(self.config.target_modules))
        title = f"LoRA of rank {self.rank} on {where}: misses {self.error:.1%} of the change"
        text = "held-out text" if self.held_out else "the data of the fit (give `held_out`)"
        elsewhere = (
            " not measured. FSRL is silent where no threshold is crossed, a LoRA nowhere: give "
            "`other_text`."
            if self.elsewhere is None
            else f"\n{self.elsewhere}"
        )
        return f"{title}\nOn {text}:\n{self.comparison}\nOn other text:{elsewhere}"


def to_lora(
    model: nn.Module,
    data: Batches,
    rank: int,
    *,
    held_out: Batches | None = None,
    other_text: Batches | None = None,
    target: str | None = None,
    bias: bool = True,
    ridge: float = 0.0,
) -> LoRAExport:
    """An adapter as an ordinary LoRA, with the loss and the divergence that this costs.

    An approximation, and an honest one: FSRL is piecewise affine and a LoRA is one affine map.

    Args:
        model: a model with FSRL adapters, one of them active.
        data: what it is fitted to; see ``fit_single_lora``.
        rank: of the LoRA.
        held_out: what it is measured on; None measures on ``data`` too.
        other_text: text of another kind than the adapter was trained for, to be measured on too.
        target: see ``fit_single_lora``.
        bias: see ``fit_single_lora``.
        ridge: see ``fit_single_lora``.
    """
    fitted = fit_single_lora(model, data, target=target, bias=bias, ridge=ridge)
    config, state = fitted.export(rank)
    measure = partial(measure_fidelity, model, stand_ins=fitted.stand_ins([rank]))
    return LoRAExport(
        config,
        state,
        rank,
        fitted.error(rank),
        measure(data if held_out is None else held_out),
        held_out is not None,
        None if other_text is None else measure(other_text),
    )


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


def _resolve_sites(model: nn.Module, target: str | None) -> tuple[Site, ...]:
    sites = tuple(
        _resolve_site(layer, target)
        for layer in fsrl_layers(model).values()
        if set(layer.active_adapters) & set(layer.fsrl_adapter) and not layer.disable_adapters
    )
    if not sites:
        raise ValueError("No adapter is active. Activate one, outside of `disable_adapter`.")
    return sites


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


def _check_writer(model: nn.Module, site: Site, batch: Any) -> None:
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
