"""The LoRA that FSRL is around each token, with a certificate that checks itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..steering import SteeringEvent, base_model, fsrl_layers, observe
from ..training.running import evaluating
from ..tuner.layer import FSRLLayer
from .capture import on_output
from .encoders import NotAffineError
from .pieces import Piece, PiecewiseAffine

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# How far beyond the boundary `check` looks for the break, in radii: on the boundary itself the two
# affine maps agree wherever the change is continuous.
_BEYOND = 0.01
# The same for a token that is on a boundary, in norms of the token.
_BEYOND_HERE = 1e-6


class CertificateCheck(NamedTuple):
    """What re-checking a certificate found; errors are relative to the size of what is compared.

    Attributes:
        output_error: the formula against the layer's own forward in float64, at the token.
        jacobian_error: ``I + B A`` against the layer's autograd Jacobian, at the token.
        inside_error: the formula against the layer's own forward, the worst of several points
            within the radius, the one nearest to the boundary among them.
        outside_error: the same beyond the nearest boundary, at most 1 % further away: where the
            LoRA breaks. None where there is no boundary, or no known direction to it.
        own_error: the formula against what the model computed in its own dtype: rounding, and
            features that rounding takes across a threshold. None if that was not seen.
    """

    output_error: float
    jacobian_error: float
    inside_error: float
    outside_error: float | None
    own_error: float | None

    def holds(self, tolerance: float = 1e-10) -> bool:
        """Whether all is exact that should be, and breaks where it should."""
        exact = max(self.output_error, self.jacobian_error, self.inside_error) <= tolerance
        return exact and (self.outside_error is None or self.outside_error > tolerance)


@dataclass(frozen=True, eq=False)
class RestrictedLoRA:
    """``x' = x + B (A x + o)``: what FSRL does to one token and to all within ``radius`` of it.

    Tensors are float64, on the CPU.

    Attributes:
        layer_name: path of the wrapped module.
        adapter_name: the adapter.
        token: position of the token, ``(row, column)`` in a batch.
        x: the wrapped module's own output there, shape ``(d_in,)``.
        active: indices in the whole SAE of the features that act by their steering vector.
        clipped: indices of the features that the adapter lowers to zero.
        lora_A: ``A``: rows of the adapter, and of the SAE's encoder for clipped features; shape
            ``(len(active) + len(clipped), d_in)``.
        lora_B: ``B``: columns of the SAE's decoder, with a minus sign for clipped features; shape
            ``(d_in, ...)``.
        offset: ``o``, shape ``(...,)``.
        radius: Euclidean distance within which this is exact; infinite if everywhere.
        tight: no larger radius would do; see ``pieces.Piece``.
        direction: unit vector to the nearest boundary, shape ``(d_in,)``; zero if not known.
        boundary: what lies at the nearest boundary; see ``pieces.Piece``.
        boundary_feature: index in the whole SAE of its feature; -1 if there is none.
    """

    layer_name: str
    adapter_name: str
    token: tuple[int, ...]
    x: Float[Tensor, "d_in"]
    active: tuple[int, ...]
    clipped: tuple[int, ...]
    lora_A: Float[Tensor, "rank d_in"]
    lora_B: Float[Tensor, "d_in rank"]
    offset: Float[Tensor, "rank"]
    radius: float
    tight: bool
    direction: Float[Tensor, "d_in"]
    boundary: str
    boundary_feature: int
    _beyond: Tensor = field(repr=False)
    _exact: FSRLLayer = field(repr=False)
    _own_output: Tensor | None = field(repr=False)

    @property
    def rank(self) -> int:
        """Rank of ``B A``, at most ``len(active) + len(clipped)``."""
        if not len(self.offset):
            return 0
        # Of the small product of triangles: the same rank without a (d_in, d_in) matrix.
        left, right = torch.linalg.qr(self.lora_B).R, torch.linalg.qr(self.lora_A.T).R
        return int(torch.linalg.matrix_rank(left @ right.T))

    @property
    def bias(self) -> Float[Tensor, "d_in"]:
        """``B o``, the LoRA's bias, shape ``(d_in,)``."""
        return self.lora_B @ self.offset

    def apply(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """``x + B (A x + o)``."""
        x = x.to(self.lora_A)
        return x + (x @ self.lora_A.T + self.offset) @ self.lora_B.T

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
                f"{type(linear).__name__}. Make one of its weight."
            )
        offset = self.offset
        if linear.bias is not None:
            offset = offset + self.lora_A @ linear.bias.detach().to(self.lora_A)
        lora_A = self.lora_A @ linear.weight.detach().to(self.lora_A)
        return lora_A, self.lora_B, self.lora_B @ offset

    def check(self, n_points: int = 8, seed: int = 0) -> CertificateCheck:
        """Check everything again, against the layer's own forward in float64.

        Args:
            n_points: random points within the radius, on spheres of different sizes.
            seed: of the points.
        """
        identity = torch.eye(len(self.x), dtype=self.x.dtype)
        jacobian = torch.autograd.functional.jacobian(self._forward, self.x, vectorize=True)
        expected = identity + self.lora_B @ self.lora_A
        # A ball without end is looked at as far as ten times the token's own size.
        reach = min(self.radius, 10 * float(self.x.norm()))
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randn(n_points, len(self.x), generator=generator, dtype=self.x.dtype)
        sizes = torch.linspace(1 / n_points, 1 - 1e-6, n_points, dtype=self.x.dtype)
        steps = steps / steps.norm(dim=1, keepdim=True) * sizes[:, None] * reach
        steps = torch.cat([steps, (1 - 1e-6) * reach * self.direction[None]])
        outside = None
        if self.direction.any():
            further = _BEYOND * self.radius or _BEYOND_HERE * (float(self.x.norm()) or 1.0)
            there = self.x + self.radius * self.direction
            outside = self._error_at(there + further * self._beyond)
        own = self._own_output
        return CertificateCheck(
            output_error=self._error_at(self.x),
            jacobian_error=_relative(jacobian, expected),
            inside_error=max(self._error_at(self.x + step) for step in steps),
            outside_error=outside,
            own_error=None if own is None else _relative(own.to(self.x), self.apply(self.x)),
        )

    def _forward(self, x: Tensor) -> Tensor:
        # As a batch of one token: encoders that read whole sequences want three dimensions.
        output: Tensor = self._exact(x[None, None])
        return output[0, 0]

    def _error_at(self, x: Tensor) -> float:
        return _relative(self._forward(x), self.apply(x))


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
        x: the wrapped module's own output, shape ``(..., d_in)``.
        adapter_name: which of its adapters; None for the active one.
        tokens: positions in ``x`` of the tokens to look at, shape ``(n, x.dim() - 1)``; None for
            all.
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
    positions = [tuple(position) for position in tokens.tolist()]
    try:
        pieces = PiecewiseAffine(layer, adapter_name)
    except NotAffineError as error:
        raise NotAffineError(str(error), tuple(positions)) from None
    index = pieces.sae.feature_index.tolist()
    found, refused, reason = [], [], ""
    for position in positions:
        point = x[position].detach().to("cpu", torch.float64)
        try:
            piece = pieces.piece(point)
        except NotAffineError as error:
            refused.append(position)
            reason = reason or f"Token {position} of '{layer.layer_name}': {error}"
            continue
        own = None if output is None else output[position].detach().cpu()
        found.append(
            _certificate(piece, layer.layer_name, adapter_name, position, point, index, pieces, own)
        )
    if refused:
        raise NotAffineError(
            f"{len(refused)} of {len(positions)} tokens have no certificate. {reason} Leave out "
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
        tokens: which to look at, non-zero where wanted, shape ``(batch, seq)``. Defaults to the
            attention mask, and without one to all.
        layer_name: only at this wrapped module; None for every steered layer.

    Returns:
        One certificate per layer and token.

    Raises:
        NotAffineError: see ``certify``.
        ValueError: if no adapter acts, samples have adapters of their own, or edits are in force,
            and for ``tokens`` of another shape.
    """
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs}
    if "adapter_names" in inputs:
        raise ValueError("Expected one adapter for all samples, found `adapter_names`. Drop it.")
    layers = fsrl_layers(model)
    if layer_name is not None and layer_name not in layers:
        raise ValueError(f"No FSRL adapter wraps {layer_name!r}; found {sorted(layers)}.")
    events: list[SteeringEvent] = []
    outputs: dict[str, Tensor] = {}
    with evaluating(model), observe(model, events.append), ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(on_output(layer.base_layer, _keeper(name, outputs)))
        base_model(model)(**inputs)
    events = [event for event in events if layer_name in (None, event.layer_name)]
    if not events:
        raise ValueError("No adapter acted. Activate one, and leave `disable_adapter`.")
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


def _certificate(
    piece: Piece,
    layer_name: str,
    adapter_name: str,
    position: tuple[int, ...],
    point: Tensor,
    index: list[int],
    pieces: PiecewiseAffine,
    own: Tensor | None,
) -> RestrictedLoRA:
    return RestrictedLoRA(
        layer_name=layer_name,
        adapter_name=adapter_name,
        token=position,
        x=point,
        active=tuple(index[i] for i in piece.active.tolist()),
        clipped=tuple(index[i] for i in piece.clipped.tolist()),
        lora_A=piece.lora_A,
        lora_B=piece.lora_B,
        offset=piece.offset,
        radius=piece.radius,
        tight=piece.tight,
        direction=piece.direction,
        boundary=piece.boundary,
        boundary_feature=index[piece.feature] if piece.feature >= 0 else -1,
        _beyond=piece.beyond,
        _exact=pieces.exact,
        _own_output=own,
    )


def _active_adapter(layer: FSRLLayer) -> str:
    here = [name for name in layer.active_adapters if name in layer.fsrl_adapter]
    if layer.disable_adapters or not here:
        raise ValueError(f"No adapter is active at '{layer.layer_name}'. Activate one, or name it.")
    return here[0]


def _keeper(name: str, outputs: dict[str, Tensor]) -> Callable[[Tensor, Tensor], None]:
    def keep(_given: Tensor, output: Tensor) -> None:
        outputs[name] = output

    return keep


def _relative(actual: Tensor, expected: Tensor) -> float:
    size = max(float(actual.norm()), float(expected.norm()))
    return float((actual - expected).norm()) / size if size else 0.0
