"""What a fine-tune does to the residual stream, said in the features of an SAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..sae.loading import take_sae
from ..steering import SteeringEvent, base_model
from ..training.running import evaluating, on_output
from ..tuner.config import FSRLConfig
from ..tuner.layer import FSRLLayer
from ..tuner.placement import resolve_targets
from .batches import Batches, check_batches, model_inputs, real_tokens
from .converse import LinearAdapter, from_factors
from .export import PROJECTION
from .reduced_rank import Moments, reduced_rank_regression
from .selection import Selection, compute_chance, select_features

if TYPE_CHECKING:
    from jaxtyping import Float

# Below this, a projection error is the rounding of a LoRA that was stored in float32.
_EXACT = 1e-5


class ChangeShare(NamedTuple):
    """A share of the squared change of the residual stream.

    Attributes:
        value: 1 where nothing is missed; below 0 where more is added than was there.
        standard_error: over sequences; nan for fewer than two.
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {self.standard_error:.1%}"


class FeatureShare(NamedTuple):
    """What one feature carries.

    Attributes:
        feature: its index in the whole SAE.
        share: by how much the share of the change in the features' span falls without it.
        mean: mean of its steering over tokens, in units of the feature's activation.
        mean_abs: mean of the absolute value.
    """

    feature: int
    share: float
    mean: float
    mean_abs: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """The change that a fine-tune makes at one place, in the features of an SAE.

    Shares are of ``E ||h_tuned - h_base||^2`` over the tokens that were judged.

    Attributes:
        place: path of the module at whose output the change was seen.
        n_tokens: tokens that were judged.
        held_out: they are not those of the fit.
        change: ``E ||h_tuned - h_base||^2 / E ||h_base||^2``.
        in_dictionary: what lies in the span of all features. 1 where they span the whole residual
            stream, as most dictionaries do: it says something only below that.
        in_features: what lies in the span of the chosen features, whatever their steering.
        chance: what would lie in the span of as many features, chosen alike, of a change that has
            the same spectrum in random directions.
        explained: what the fitted adapter does, which is to predict their steering from ``h_base``.
        features: the chosen features, those that carry most first.
        adapter: the fitted adapter.
    """

    place: str
    n_tokens: int
    held_out: bool
    change: float
    in_dictionary: ChangeShare
    in_features: ChangeShare
    chance: float
    explained: ChangeShare
    features: tuple[FeatureShare, ...]
    adapter: LinearAdapter
    _settings: Mapping[str, Any] = field(repr=False)

    def attach(self, model: nn.Module) -> PeftModel:
        """The base model with the fitted adapter in place of the fine-tune."""
        return self.adapter.attach(model, **self._settings)

    def __str__(self) -> str:
        rows = [
            f"Change at {self.place}: {self.change:.2%} of the residual stream's squared norm "
            f"({self.n_tokens} tokens{'' if self.held_out else ', those of the fit'})",
            f"  in the span of the dictionary        {self.in_dictionary}",
            f"  in the span of {len(self.features):4} features         {self.in_features}",
            f"    of a random change, by chance      {self.chance:.1%}",
            f"  explained by the fitted adapter      {self.explained}",
            f"{'feature':>10}{'share':>9}{'mean v':>10}{'mean |v|':>10}",
        ]
        for each in self.features:
            numbers = f"{each.share:9.1%}{each.mean:+10.3f}{each.mean_abs:10.3f}"
            rows.append(f"{each.feature:10}{numbers}")
        return "\n".join(rows)


def explain(
    base: nn.Module,
    tuned: nn.Module,
    sae: Any,
    data: Batches,
    *,
    layer: int | None = None,
    module: str | None = None,
    held_out: Batches | None = None,
    n_features: int = 16,
    min_gain: float = 1e-3,
    ridge: float = 0.0,
) -> Explanation:
    """Fit a linear FSRL adapter to the difference between two models at one place.

    Features are chosen by what of the change they span (``selection.select_features``), and their
    steering is regressed on the base model's activations. Only second moments are kept. Changes
    that come after the place are not seen.

    Args:
        base: the base model.
        tuned: the fine-tuned model: another model of the same shape, or ``base`` with adapters
            (a ``PeftModel``; they are switched off where the base model is needed).
        sae: an SAE of the base model: a reference, live or frozen.
        data: batches of ``input_ids`` and ``attention_mask``.
        layer: the decoder layer at whose output to look; by default where the SAE was trained.
        module: path of a module to look at instead.
        held_out: what shares are measured on; None measures on ``data`` too.
        n_features: the largest number of features.
        min_gain: no feature that adds less to the share in their span.
        ridge: of the regression; see ``reduced_rank_regression``.

    Raises:
        NotAffineError: for an SAE that normalizes when it runs.
        TypeError: see ``batches.check_batches``.
        ValueError: if the models are the same, nothing changes at that place, or no feature holds
            anything of the change.
    """
    study = _Study(base, tuned, sae, layer, module, n_features, min_gain)
    selection = study.select(data)
    return study.judge(study.fit(selection, ridge), selection, data, held_out)


def from_lora(
    base: nn.Module,
    lora: PeftModel | str | Path,
    sae: Any,
    data: Batches,
    *,
    layer: int | None = None,
    module: str | None = None,
    held_out: Batches | None = None,
    n_features: int = 16,
    min_gain: float = 1e-3,
    ridge: float = 0.0,
) -> Explanation:
    """Turn a LoRA into an FSRL adapter: by algebra where it acts where the SAE reads, else by fit.

    A LoRA on the very module whose output the SAE reads (a linear layer that is as wide as what it
    reads, or a projection from ``insert_projection``) becomes an adapter without any error if its
    ``B`` lies in the dictionary's span. With the chosen features alone if they span it, else with
    all. Any other LoRA is fitted as ``explain`` fits a fine-tune.

    Args:
        base: the base model.
        lora: ``base`` with a LoRA, or the folder or Hub id of one, which is taken off again.
        sae: see ``explain``.
        data: see ``explain``.
        layer: see ``explain``.
        module: see ``explain``.
        held_out: see ``explain``.
        n_features: see ``explain``.
        min_gain: see ``explain``.
        ridge: see ``explain``.
    """
    given = isinstance(lora, nn.Module)
    tuned: Any = lora if given else PeftModel.from_pretrained(base, str(lora))
    try:
        study = _Study(base, tuned, sae, layer, module, n_features, min_gain)
        factors = study.factors_at_place()
        selection = study.select(data)
        if factors is None:
            adapter = study.fit(selection, ridge)
        else:
            lora_A, lora_B, bias = factors
            few = selection.features
            adapter = from_factors(lora_A, lora_B, study.sae, bias=bias, features=few)
            if adapter.projection_error > _EXACT:
                adapter = from_factors(lora_A, lora_B, study.sae, bias=bias)
        return study.judge(adapter, selection, data, held_out)
    finally:
        if not given:
            tuned.unload()


class _Study:
    """Two models, one place, one SAE."""

    def __init__(
        self,
        base: nn.Module,
        tuned: nn.Module,
        sae: Any,
        layer: int | None,
        module: str | None,
        n_features: int,
        min_gain: float,
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
        self._directions = self.sae.directions.to("cpu", torch.float64)
        self._n_features, self._min_gain = n_features, min_gain
        self._moments = Moments()
        config = FSRLConfig(layer=layer, sae=self.sae)
        if module is None:
            [self.path] = resolve_targets(config, {"": self.sae}, self.base)
        else:
            self.path = module
        self.place: dict[str, Any] = {"target_modules": [self.path]}
        if module is None and config.layer is not None:
            self.place = {"layer": config.layer}

    def select(self, data: Batches) -> Selection:
        """Features of the SAE, by their indices in the whole, whose span holds the change."""
        for x, delta, mask in self._pairs(data):
            self._moments.update(x[mask], delta[mask])
        if not self._moments.n or not self._moments.size:
            raise ValueError(f"Nothing changes at '{self.path}': the models agree there.")
        found = select_features(
            self._second_moment,
            self._directions,
            n_features=self._n_features,
            min_gain=self._min_gain,
        )
        if not found.features:
            raise ValueError(
                f"No feature's direction holds a share of {self._min_gain} of the change at "
                f"'{self.path}': the dictionary does not describe it. Lower `min_gain`, or use "
                "another SAE."
            )
        index = self.sae.feature_index
        return found._replace(features=tuple(int(index[each]) for each in found.features))

    def fit(self, selection: Selection, ridge: float) -> LinearAdapter:
        """The steering of the selected features, by least squares."""
        fit = reduced_rank_regression(self._moments, ridge=ridge)
        mean_x, mean_y = self._moments.mean
        adapter = from_factors(
            fit.full,
            torch.eye(len(mean_y), dtype=torch.float64),
            self.sae,
            bias=mean_y - fit.full @ mean_x,
            features=selection.features,
        )
        return adapter.merged()

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
        if float((through @ weight - lora_A).norm()) > _EXACT * float(lora_A.norm()):
            return None
        if linear.bias is not None:
            bias = bias - lora_B @ (through @ linear.bias.detach().double().cpu())
        return through, lora_B, bias

    def judge(
        self,
        adapter: LinearAdapter,
        selection: Selection,
        data: Batches,
        held_out: Batches | None,
    ) -> Explanation:
        """Shares on data, per sequence, by the adapter's own forward in float64."""
        layer = FSRLLayer(nn.Identity(), self.path)
        layer.update_layer("fitted", adapter.config(self.sae, **self.place), adapter.sae)
        layer.to(torch.float64)
        adapter.fill(layer, "fitted")
        sums = torch.zeros(2, adapter.sae.n_features, dtype=torch.float64)
        n_tokens, base_size, rows = 0, 0.0, []

        def add(event: SteeringEvent) -> None:
            v = event.steering_vector[mask]
            sums.add_(torch.stack([v.sum(dim=0), v.abs().sum(dim=0)]))

        layer.observers.append(add)
        chosen = _projector(self._directions[self.sae.positions(selection.features)])
        whole = _projector(self._directions)
        for x, delta, mask in self._pairs(data if held_out is None else held_out):
            with torch.no_grad():
                fitted = layer(x) - x
            wrong = (delta - delta @ whole, delta - delta @ chosen, delta - fitted, delta)
            sizes = [torch.where(mask, part.square().sum(dim=-1), 0).sum(dim=1) for part in wrong]
            rows.append(torch.stack(sizes, dim=1))
            base_size += float(x[mask].square().sum())
            n_tokens += int(mask.sum())
        missed = torch.cat(rows)
        in_dictionary, in_features, explained = (
            _share(missed[:, part], missed[:, 3]) for part in range(3)
        )
        means = (sums / n_tokens)[:, adapter.sae.positions(selection.features)].T.tolist()
        order = sorted(selection.features)
        return Explanation(
            place=self.path,
            n_tokens=n_tokens,
            held_out=held_out is not None,
            change=float(missed[:, 3].sum()) / base_size,
            in_dictionary=in_dictionary,
            in_features=in_features,
            chance=compute_chance(
                self._second_moment, self._directions, n_features=len(selection.features)
            ),
            explained=explained,
            features=tuple(
                FeatureShare(feature, share, *means[order.index(feature)])
                for feature, share in zip(selection.features, selection.shares, strict=True)
            ),
            adapter=adapter,
            _settings={"sae": self.source, **self.place},
        )

    @property
    def _second_moment(self) -> Float[Tensor, "d d"]:
        mean = self._moments.mean[1]
        return self._moments.covariance[2] + torch.outer(mean, mean)

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


def _share(missed: Tensor, total: Tensor) -> ChangeShare:
    """One minus a ratio of sums over sequences, with the standard error of a ratio estimator."""
    ratio, n = float(missed.sum() / total.sum()), len(total)
    if n < 2:
        return ChangeShare(1 - ratio, float("nan"))
    spread = (missed - ratio * total).square().sum() * n / (n - 1)
    return ChangeShare(1 - ratio, float(spread.sqrt() / total.sum()))
