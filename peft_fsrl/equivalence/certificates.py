"""The LoRA that FSRL is around each token, with a certificate that checks itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..steering import SteeringEvent, base_model, fsrl_layers, observe
from ..training.running import evaluating, on_output
from ..tuner.layer import FSRLLayer
from .batches import check_inputs
from .encoders import NotAffineError
from .pieces import Factors, Piece, PiecewiseAffine, positions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# How far beyond the boundary `check` looks first, in radii: on the boundary itself the two affine
# maps agree wherever the change is continuous.
_BEYOND = 0.01
# The same for a token that is all but on a boundary, in norms of the token.
_BEYOND_HERE = 1e-12
# A break of so many times the rounding can be seen.
_VISIBLE = 1e3


class CertificateCheck(NamedTuple):
    """What re-checking a certificate found.

    Errors are in units of the change that the adapter makes to the token, ``norm(x' - x)``, the
    Jacobian's in units of its own (of the token's norm, where the adapter changes nothing).

    Attributes:
        output_error: the formula against the layer's own forward in float64, at the token.
        jacobian_error: ``I + B A`` against the layer's autograd, in random directions.
        inside_error: the formula against the layer's own forward, the worst of several points
            within the radius, the one nearest to the boundary among them. Infinite if some feature
            acts by another formula there.
        outside_error: the same beyond the nearest boundary: where the LoRA breaks. At most 1 %
            further away (or 1e-12 of the token's norm) if rounding does not hide a break there,
            else as far as it takes. None where there is no boundary, no known direction to it, or
            nothing to be seen at any distance.
        break_error: what is left of that after the break that the features' formulas predict.
            Infinite if the boundary's feature has not left its formula where the boundary should
            have been crossed.
        rounding: what float64 may make of exact values, in the same units.
        own_error: the formula's change against the change that the model made in its own dtype:
            rounding, and features that rounding takes across a threshold. None if not seen.
    """

    output_error: float
    jacobian_error: float
    inside_error: float
    outside_error: float | None
    break_error: float | None
    rounding: float
    own_error: float | None

    def holds(self) -> bool:
        """Whether all is exact, to rounding, that should be, and breaks where and as it should."""
        exact = max(self.output_error, self.jacobian_error, self.inside_error) <= self.rounding
        if self.outside_error is None or self.break_error is None:
            return exact
        return exact and self.break_error <= self.rounding < self.outside_error


@dataclass(frozen=True, eq=False)
class RestrictedLoRA(Piece):
    """``x' = x + B (A x + o)``: what FSRL does to one token and to all within ``radius`` of it.

    For radius, boundary and state see ``Piece``.

    Tensors are float64, on the CPU. Factors are made from the adapter and the SAE, of which all
    certificates of a layer share one copy, each time they are asked for: kept, those of a dense
    adapter would take tens of MiB per token.

    Attributes:
        layer_name: path of the wrapped module.
        adapter_name: the adapter.
        token: position of the token, ``(row, column)`` in a batch.
        x: the wrapped module's own output there.
    """

    layer_name: str
    adapter_name: str
    token: tuple[int, ...]
    x: Float[Tensor, "d_in"]
    _map: PiecewiseAffine = field(repr=False)
    _own_output: Tensor | None = field(repr=False)

    @property
    def active(self) -> tuple[int, ...]:
        """Indices in the whole SAE of the features that act by their steering vector."""
        return tuple(self._map.sae.feature_index[positions(self.state)[0]].tolist())

    @property
    def clipped(self) -> tuple[int, ...]:
        """Indices in the whole SAE of the features that the adapter lowers to zero."""
        return tuple(self._map.sae.feature_index[positions(self.state)[1]].tolist())

    @property
    def lora_A(self) -> Float[Tensor, "rank d_in"]:
        """Rows of the adapter for active features, then of the SAE's encoder for clipped ones."""
        return self._factors.lora_A

    @property
    def lora_B(self) -> Float[Tensor, "d_in rank"]:
        """Columns of the SAE's decoder, with a minus sign for clipped features."""
        return self._factors.lora_B

    @property
    def offset(self) -> Float[Tensor, "rank"]:
        """``o``, one entry per row of ``lora_A``."""
        return self._factors.offset

    @property
    def bias(self) -> Float[Tensor, "d_in"]:
        """``B o``, the LoRA's bias."""
        return self._factors.lora_B @ self._factors.offset

    @property
    def rank(self) -> int:
        """Rank of ``B A``, at most ``len(active) + len(clipped)``."""
        lora_A, lora_B, offset = self._factors
        if not len(offset):
            return 0
        # Of the small product of triangles: the same rank without a (d_in, d_in) matrix.
        left, right = torch.linalg.qr(lora_B).R, torch.linalg.qr(lora_A.T).R
        return int(torch.linalg.matrix_rank(left @ right.T))

    def apply(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """``x + B (A x + o)``."""
        lora_A, lora_B, offset = self._factors
        x = x.to(lora_A)
        return x + (x @ lora_A.T + offset) @ lora_B.T

    def on_linear(self, linear: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
        """The same LoRA on the weight of the linear layer whose output is steered.

        Args:
            linear: ``x = W h + b``.

        Returns:
            ``lora_A = A W``, ``lora_B = B`` and the bias ``B (A b + o)``.

        Raises:
            TypeError: for another module, whose weight may lie the other way round.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"Expected the nn.Linear that is steered, without adapters, got "
                f"{type(linear).__name__}. Make one from its weight."
            )
        lora_A, lora_B, offset = self._factors
        if linear.bias is not None:
            offset = offset + lora_A @ linear.bias.detach().to(lora_A)
        return lora_A @ linear.weight.detach().to(lora_A), lora_B, lora_B @ offset

    def check(self, n_points: int = 8, seed: int = 0) -> CertificateCheck:
        """Check everything again, against the layer's own forward in float64.

        Args:
            n_points: random points within the radius, on spheres of different sizes, and random
                directions for the Jacobian.
            seed: of the points.
        """
        generator = torch.Generator().manual_seed(seed)
        norm = float(self.x.norm())
        units = torch.randn(n_points, len(self.x), generator=generator, dtype=self.x.dtype)
        units = units / units.norm(dim=1, keepdim=True)
        # A ball without end is looked at as far as ten times the token's own size.
        reach = min(self.radius, 10 * norm)
        sizes = torch.linspace(1 / n_points, 1 - 1e-6, n_points, dtype=self.x.dtype)
        steps = torch.cat([sizes[:, None] * units, (1 - 1e-6) * self.direction[None]])
        inside = self.x + reach * torch.cat([torch.zeros_like(steps[:1]), steps])
        change = self.apply(self.x) - self.x
        unit = float(change.norm()) or norm or 1.0
        rounding = self._map.noise(self.state, norm + reach) / unit
        errors = (self._forward(inside) - self.apply(inside)).norm(dim=1) / unit
        errors[self._map.departures(self.state, inside).any(dim=1)] = torch.inf
        jacobian_error, jacobian_rounding = self._check_jacobian(units)
        outside, after = self._check_break(norm, unit)
        own = self._own_output
        return CertificateCheck(
            output_error=float(errors[0]),
            jacobian_error=jacobian_error,
            inside_error=float(errors[1:].max()),
            outside_error=outside,
            break_error=after,
            rounding=max(rounding, jacobian_rounding),
            own_error=None if own is None else _relative(own.to(self.x) - self.x, change),
        )

    @property
    def _factors(self) -> Factors:
        return self._map.factors(self.state)

    def _forward(self, points: Tensor) -> Tensor:
        # Each a sequence of its own: some encoders read whole sequences.
        output: Tensor = self._map.exact(points[:, None])
        return output[:, 0]

    def _check_jacobian(self, units: Tensor) -> tuple[float, float]:
        """Error and rounding, in units of the largest image of a unit vector."""
        lora_A, lora_B, _ = self._factors
        x = self.x.expand_as(units).clone().requires_grad_()
        with torch.enable_grad():
            [pulled] = torch.autograd.grad(self._forward(x), x, units)
        expected = units @ lora_B @ lora_A
        size = float(expected.norm(dim=1).max()) or 1.0
        error = float((pulled - units - expected).norm(dim=1).max())
        return error / size, self._map.slope_noise(self.state) / size

    def _check_break(self, norm: float, unit: float) -> tuple[float | None, float | None]:
        """``outside_error`` and ``break_error``."""
        if not self.direction.any():
            return None, None
        [feature] = self._map.sae.positions([self.boundary_feature]).tolist()
        further = max(_BEYOND * self.radius, _BEYOND_HERE * (norm or 1.0))
        crossed = self.x + self.radius * self.direction
        while True:
            point = crossed + further * self.beyond
            departures = self._map.departures(self.state, point)
            predicted = departures @ self._map.directions
            noise = self._map.noise(self.state, norm + self.radius + further)
            visible = float(predicted.norm()) > _VISIBLE * noise
            found = self._forward(point[None])[0] - self.apply(point)
            if not departures[feature]:
                return float(found.norm()) / unit, torch.inf
            if visible:
                return float(found.norm()) / unit, float((found - predicted).norm()) / unit
            if further > norm + self.radius:
                return None, None
            further *= 10


def certify(
    layer: FSRLLayer,
    x: Float[Tensor, "*tokens d_in"],
    adapter_name: str | None = None,
    *,
    tokens: Int[Tensor, "n dims"] | None = None,
    output: Float[Tensor, "*tokens d_in"] | None = None,
) -> list[RestrictedLoRA]:
    """The LoRA that an adapter is around each of some outputs of the module that it steers.

    Args:
        layer: a steering layer.
        x: the wrapped module's own output.
        adapter_name: which of its adapters; None for the active one.
        tokens: positions in ``x`` of the tokens to look at; None for all.
        output: what the layer made of ``x``, for comparison.

    Returns:
        One certificate per token, in the order of ``tokens``.

    Raises:
        NotAffineError: if FSRL is not affine around some token, or nothing is known that would
            prove it; its ``tokens`` says which.
        ValueError: while edits are in force, or if no adapter is active.
    """
    if adapter_name is None:
        adapter_name = _active_adapter(layer)
    if tokens is None:
        tokens = torch.ones(x.shape[:-1]).nonzero()
    places = [tuple(place) for place in tokens.tolist()]
    try:
        pieces = PiecewiseAffine(layer, adapter_name)
    except NotAffineError as error:
        raise NotAffineError(str(error), tuple(places)) from None
    found, refused, reason = [], [], ""
    for place in places:
        point = x[place].detach().to("cpu", torch.float64, copy=True)
        try:
            piece = pieces.piece(point)
        except NotAffineError as error:
            refused.append(place)
            reason = reason or f"Token {place} of '{layer.layer_name}': {error}"
            continue
        found.append(
            RestrictedLoRA(
                **vars(piece),
                layer_name=layer.layer_name,
                adapter_name=adapter_name,
                token=place,
                x=point,
                _map=pieces,
                # A copy: a view would keep the whole batch.
                _own_output=None if output is None else output[place].detach().cpu().clone(),
            )
        )
    if refused:
        raise NotAffineError(
            f"{len(refused)} of {len(places)} tokens have no certificate. {reason} Leave out "
            "the tokens that this error's `tokens` names.",
            tuple(refused),
        )
    return found


def restricted_lora(
    model: nn.Module,
    inputs: Mapping[str, Any] | Int[Tensor, "batch seq"],
    *,
    tokens: Bool[Tensor, "batch seq"] | None = None,
    layer_name: str | None = None,
) -> list[RestrictedLoRA]:
    """The LoRA that the model's active adapter is around each token of a batch.

    Args:
        model: a model with FSRL adapters.
        inputs: of its forward, with ``input_ids``; or the ids alone.
        tokens: which to look at, non-zero where wanted. Defaults to the attention mask, and without
            one to all.
        layer_name: only at this wrapped module; None for every steered layer.

    Returns:
        One certificate per layer and token.

    Raises:
        NotAffineError: see ``certify``.
        TypeError: for inputs that are neither a tensor nor a mapping with one.
        ValueError: if no adapter acts, samples have adapters of their own, or edits are in force,
            and for ``tokens`` of another shape.
    """
    inputs = check_inputs({"input_ids": inputs} if isinstance(inputs, Tensor) else inputs)
    if "adapter_names" in inputs:
        raise ValueError("Expected one adapter for all samples, found `adapter_names`. Drop it.")
    layers = fsrl_layers(model)
    if layer_name is not None and layer_name not in layers:
        raise ValueError(f"No FSRL adapter wraps {layer_name!r}; found {sorted(layers)}.")
    events: list[SteeringEvent] = []
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _given: Tensor, output: Tensor) -> None:
        outputs[name] = output

    with evaluating(model), observe(model, events.append), ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(on_output(layer.base_layer, partial(keep, name)))
        base_model(model)(**inputs)
    events = [event for event in events if layer_name in (None, event.layer_name)]
    if not events:
        raise ValueError("No adapter acted. Activate one, outside of `disable_adapter`.")
    found = []
    for event in events:
        mask = tokens if tokens is not None else inputs.get("attention_mask")
        shape = event.hidden_states.shape[:-1]
        if mask is None:
            mask = torch.ones(shape)
        elif tokens is None and mask.dim() == len(shape):
            # With a cache the mask covers what the cache holds too.
            mask = mask[:, -shape[-1] :]
        if mask.shape != shape:
            expected = f"Expected `tokens` of shape {tuple(shape)}, as the input has"
            raise ValueError(f"{expected}, got {tuple(mask.shape)}. Leave them out for all.")
        found += certify(
            layers[event.layer_name],
            event.hidden_states,
            event.adapter_name,
            tokens=mask.cpu().nonzero(),
            output=outputs[event.layer_name],
        )
    return found


def _active_adapter(layer: FSRLLayer) -> str:
    here = [name for name in layer.active_adapters if name in layer.fsrl_adapter]
    if layer.disable_adapters or not here:
        raise ValueError(f"No adapter is active at '{layer.layer_name}'. Activate one, or name it.")
    return here[0]


def _relative(actual: Tensor, expected: Tensor) -> float:
    size = max(float(actual.norm()), float(expected.norm()))
    return float((actual - expected).norm()) / size if size else 0.0
