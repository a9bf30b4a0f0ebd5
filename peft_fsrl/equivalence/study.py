"""Two models at one place: how they differ there, and how well an adapter stands for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..sae.loading import take_sae
from ..steering import SteeringEvent, base_model
from ..training.running import evaluating
from ..tuner.config import FSRLConfig
from ..tuner.layer import FSRLLayer
from ..tuner.placement import resolve_targets
from .capture import Batches, check_batches, model_inputs, on_output, real_tokens
from .converse import LinearAdapter
from .explanation import Explanation, FeatureShare, Share
from .reduced_rank import Moments
from .selection import Selection, select_features
from .sites import PROJECTION

if TYPE_CHECKING:
    from jaxtyping import Float

# Below this, a projection error is the rounding of a LoRA that was stored in float32.
EXACT = 1e-5


class Study:
    """Two models, one place, one SAE."""

    def __init__(
        self, base: nn.Module, tuned: nn.Module, sae: Any, layer: int | None, module: str | None
    ) -> None:
        self.base, self.tuned = base_model(base), base_model(tuned)
        self._without: Callable[[], AbstractContextManager[Any]] = nullcontext
        if self.base is self.tuned:
            if not isinstance(tuned, PeftModel):
                raise ValueError(
                    "`base` and `tuned` are the same model. Give two, or a PeftModel as `tuned`, "
                    "whose adapters can be switched off."
                )
            self._without = tuned.disable_adapter
        self.source = sae
        self.sae = take_sae(sae)
        config = FSRLConfig(layer=layer, sae=self.sae)
        if module is None:
            [self.path] = resolve_targets(config, {"": self.sae}, self.base)
        else:
            self.path = module
        self.place: dict[str, Any] = {"target_modules": [self.path]}
        if module is None and config.layer is not None:
            self.place = {"layer": config.layer}

    def moments(self, data: Batches) -> Moments:
        """Of the base model's activations and their change."""
        moments = Moments()
        for x, delta, mask in self._pairs(data):
            moments.update(x[mask], delta[mask])
        if not moments.n or not moments.size:
            raise ValueError(f"Nothing changes at '{self.path}': the models agree there.")
        return moments

    def select(self, moments: Moments, n_features: int, min_gain: float) -> Selection:
        """Features of the SAE, by their indices in the whole, whose span holds the change."""
        mean = moments.mean[1]
        second = moments.covariance[2] + torch.outer(mean, mean)
        directions = self.sae.directions.to("cpu", torch.float64)
        found = select_features(second, directions, n_features=n_features, min_gain=min_gain)
        if not found.features:
            raise ValueError(
                f"No feature's direction holds a share of {min_gain} of the change at "
                f"'{self.path}': the dictionary does not describe it. Lower `min_gain`, or use "
                "another SAE."
            )
        index = self.sae.feature_index
        return found._replace(features=tuple(int(index[each]) for each in found.features))

    def factors_at_place(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """``A``, ``B`` and bias of a LoRA that reads and writes what the SAE reads, if it does."""
        layers = {n: m for n, m in self.tuned.named_modules() if isinstance(m, LoraLayer)}
        if set(layers) not in ({self.path}, {f"{self.path}.{PROJECTION}"}):
            return None
        [(place, layer)] = layers.items()
        linear = layer.get_base_layer()
        if not isinstance(linear, nn.Linear) or not _is_plain(layer):
            return None
        lora_A, lora_B, bias = _active_factors(layer)
        if place != self.path:
            return lora_A, lora_B, bias
        # The LoRA reads h and the SAE W h + b: what it reads of h must come through W.
        weight = linear.weight.detach().double().cpu()
        through = torch.linalg.lstsq(weight.T, lora_A.T).solution.T
        if float((through @ weight - lora_A).norm()) > EXACT * float(lora_A.norm()):
            return None
        if linear.bias is not None:
            bias = bias - lora_B @ (through @ linear.bias.detach().double().cpu())
        return through, lora_B, bias

    def judge(self, adapter: LinearAdapter, selection: Selection, data: Batches) -> Explanation:
        """Shares on data, per sequence, by the adapter's own forward in float64."""
        layer = FSRLLayer(nn.Identity(), self.path)
        layer.update_layer("fitted", adapter.config(self.sae, **self.place), adapter.sae)
        layer.to(torch.float64)
        adapter.fill(layer, "fitted")
        steering = _MeanSteering()
        layer.observers.append(steering.add)
        directions = self.sae.directions.to("cpu", torch.float64)
        chosen = _projector(directions[self.sae.positions(selection.features)])
        whole = _projector(directions)
        rows, base_size = [], 0.0
        for x, delta, mask in self._pairs(data):
            steering.mask = mask
            with torch.no_grad():
                fitted = layer(x) - x
            wrong = (delta - delta @ whole, delta - delta @ chosen, delta - fitted, delta)
            sizes = [torch.where(mask, part.square().sum(dim=-1), 0).sum(dim=1) for part in wrong]
            rows.append(torch.stack(sizes, dim=1))
            base_size += float(x[mask].square().sum())
        missed = torch.cat(rows)
        in_dictionary, in_features, explained = (
            _share(missed[:, part], missed[:, 3]) for part in range(3)
        )
        place = {int(f): i for i, f in enumerate(adapter.sae.feature_index)}
        features = tuple(
            FeatureShare(feature, share, *steering.means(place[feature]))
            for feature, share in zip(selection.features, selection.shares, strict=True)
        )
        return Explanation(
            place=self.path,
            n_tokens=steering.n_tokens,
            change=float(missed[:, 3].sum()) / base_size,
            in_dictionary=in_dictionary,
            in_features=in_features,
            explained=explained,
            features=features,
            adapter=adapter,
            _settings={"sae": self.source, **self.place},
        )

    def _pairs(self, data: Batches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The base model's activations, their change, and which tokens are real."""
        with evaluating(self.base, self.tuned):
            for batch in check_batches(data):
                with self._without():
                    x = self._activations(self.base, batch)
                yield x, self._activations(self.tuned, batch) - x, real_tokens(batch)

    def _activations(self, model: nn.Module, batch: Mapping[str, Any]) -> Float[Tensor, "b s d"]:
        seen: list[Tensor] = []

        def keep(_given: Tensor, output: Tensor) -> None:
            seen.append(output.to("cpu", torch.float64))

        with on_output(model.get_submodule(self.path), keep):
            model(**model_inputs(batch, model))
        return seen[0]


class _MeanSteering:
    def __init__(self) -> None:
        self.mask = torch.zeros(0)
        self.n_tokens = 0
        self._sums = torch.zeros(2, 0, dtype=torch.float64)

    def add(self, event: SteeringEvent) -> None:
        v = event.steering_vector[self.mask]
        sums = torch.stack([v.sum(dim=0), v.abs().sum(dim=0)])
        self._sums = self._sums + sums if self.n_tokens else sums
        self.n_tokens += len(v)

    def means(self, position: int) -> tuple[float, float]:
        mean, mean_abs = (self._sums[:, position] / self.n_tokens).tolist()
        return mean, mean_abs


def _is_plain(layer: Any) -> bool:
    """Whether one LoRA acts, and as a product of two factors (not as DoRA, for one)."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    variants = getattr(layer, "lora_variant", {})
    return len(active) == 1 == len(layer.active_adapters) and active[0] not in variants


def _active_factors(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    [name] = layer.active_adapters
    lora_A = layer.lora_A[name].weight.detach().double().cpu()
    lora_B = layer.lora_B[name].weight.detach().double().cpu() * layer.scaling[name]
    bias = layer.lora_B[name].bias
    if bias is None:
        return lora_A, lora_B, torch.zeros(len(lora_B), dtype=torch.float64)
    return lora_A, lora_B, bias.detach().double().cpu() * layer.scaling[name]


def _projector(directions: Tensor) -> Float[Tensor, "d_in d_in"]:
    """Onto the span of the rows."""
    moment = directions.T @ directions
    values, vectors = torch.linalg.eigh(moment)
    basis = vectors[:, values > 1e-12 * values[-1]]
    return basis @ basis.T


def _share(missed: Tensor, total: Tensor) -> Share:
    """One minus a ratio of sums over sequences, with the standard error of a ratio estimator."""
    ratio, n = float(missed.sum() / total.sum()), len(total)
    if n < 2:
        return Share(1 - ratio, float("nan"))
    spread = (missed - ratio * total).square().sum() * n / (n - 1)
    return Share(1 - ratio, float(spread.sqrt() / total.sum()))
