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

from ..steering import SteeringEvent, base_model, observe
from ..training.running import evaluating
from .capture import Batches, check_batches, model_inputs, on_output, real_tokens
from .measure import Comparison, compare
from .reduced_rank import Moments, ReducedRank, reduced_rank_regression
from .sites import Site, check_writer, resolve_sites


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
        with ExitStack() as stack:
            for site, fit in zip(self.sites, self.fits, strict=True):
                factors = tuple(factor.float() for factor in fit.factors(rank))
                stack.enter_context(on_output(site.module, _adder(site, *factors)))
            yield

    def export(self, rank: int, **config: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
        """A LoRA for stock PEFT.

        Args:
            rank: its rank.
            config: further settings of the ``LoraConfig``.

        Returns:
            Config and state dict; what ``PeftModel.save_pretrained`` writes for a LoRA.
        """
        state = {}
        has_bias = any(fit.intercept for fit in self.fits)
        for site, fit in zip(self.sites, self.fits, strict=True):
            lora_A, lora_B, bias = (factor.float().contiguous() for factor in fit.factors(rank))
            prefix = f"base_model.model.{site.path}"
            state[f"{prefix}.lora_A.weight"] = lora_A
            state[f"{prefix}.lora_B.weight"] = lora_B
            if has_bias:
                state[f"{prefix}.lora_B.bias"] = bias
        settings = {
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "target_modules": [site.path for site in self.sites],
            "lora_bias": has_bias,
            "fan_in_fan_out": any(isinstance(site.module, Conv1D) for site in self.sites),
            "inference_mode": True,
            "task_type": "CAUSAL_LM",
        }
        return LoraConfig(**{**settings, **config}), state


@dataclass(frozen=True, eq=False)
class LoRAExport:
    """A LoRA that stands for an adapter, with what that costs.

    Attributes:
        config: for stock PEFT.
        state_dict: in the form in which PEFT saves it.
        rank: of the LoRA.
        error: share of the squared change of the residual stream that it misses, on the data that
            it was fitted to.
        comparison: loss and divergence of base, FSRL and LoRA.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor]
    rank: int
    error: float
    comparison: Comparison

    def save(self, directory: str | Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt"}
        save_file(self.state_dict, Path(directory) / "adapter_model.safetensors", metadata=metadata)
        self.config.save_pretrained(str(directory))

    def __str__(self) -> str:
        where = ", ".join(sorted(self.config.target_modules))
        title = f"LoRA of rank {self.rank} on {where}: misses {self.error:.1%} of the change"
        return f"{title}\n{self.comparison}"


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
            numbers. Only second moments are kept.
        target: what carries the LoRA. None: the linear layer that is steered, or, where a decoder
            layer is, the last one of its MLP, which writes to the residual stream.
            ``"projection"``: an identity in the residual stream that ``insert_projection`` puts
            there. Otherwise the path of a linear layer inside the decoder layer, such as
            ``"self_attn.o_proj"``, that writes to the residual stream.
        bias: whether the LoRA has a bias.
        ridge: see ``reduced_rank_regression``.

    Raises:
        TypeError: see ``capture.check_batches``.
        ValueError: if no adapter acts, there is no such linear layer, or what it writes does not
            reach the layer's output unchanged.
    """
    sites = resolve_sites(model, target)
    names: set[str] = set()
    moments = tuple(Moments() for _ in sites)
    read: dict[int, Tensor] = {}
    x: dict[str, Tensor] = {}

    def see(event: SteeringEvent) -> None:
        names.add(event.adapter_name)
        x[event.layer_name] = event.hidden_states

    with evaluating(model), observe(model, see), ExitStack() as stack:
        mask = torch.zeros(0)
        for index, site in enumerate(sites):
            if not site.projects:
                stack.enter_context(on_output(site.module, _keeper(read, index)))

        def add(index: int) -> Callable[[Tensor, Tensor], None]:
            def regress(_given: Tensor, output: Tensor) -> None:
                own = x.pop(sites[index].layer.layer_name)
                chosen = mask.to(own.device)
                given = own if sites[index].projects else read.pop(index)
                delta = output.double() - own.double()
                moments[index].update(given[chosen].double(), delta[chosen])

            return regress

        for index, site in enumerate(sites):
            stack.enter_context(on_output(site.layer.base_layer, add(index)))
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
        check_writer(model, site, next(iter(data)))
    fits = tuple(reduced_rank_regression(m, intercept=bias, ridge=ridge) for m in moments)
    return SingleLoRA(sites, fits, names.pop())


def to_lora(
    model: nn.Module,
    data: Batches,
    rank: int,
    *,
    held_out: Batches | None = None,
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
        target: see ``fit_single_lora``.
        bias: see ``fit_single_lora``.
        ridge: see ``fit_single_lora``.
    """
    fitted = fit_single_lora(model, data, target=target, bias=bias, ridge=ridge)
    config, state = fitted.export(rank)
    return LoRAExport(
        config,
        state,
        rank,
        fitted.error(rank),
        compare(model, data if held_out is None else held_out, stand_ins(fitted, [rank])),
    )


def stand_ins(
    fitted: SingleLoRA, ranks: Sequence[int]
) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Stand-ins of several ranks for ``measure.compare``."""
    return {f"LoRA of rank {rank}": partial(fitted.applied, rank) for rank in ranks}


def _keeper(read: dict[int, Tensor], index: int) -> Callable[[Tensor, Tensor], None]:
    def keep(given: Tensor, _output: Tensor) -> None:
        read[index] = given

    return keep


def _adder(
    site: Site, lora_A: Tensor, lora_B: Tensor, bias: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    def add(given: Tensor, output: Tensor) -> Tensor:
        rows = site.reads(given, output).float()
        factors = [factor.to(rows.device) for factor in (lora_A, lora_B, bias)]
        return output + (rows @ factors[0].T @ factors[1].T + factors[2]).to(output.dtype)

    return add
