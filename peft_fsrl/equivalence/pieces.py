"""FSRL at one layer as a piecewise affine map: which piece a token is on, and how far that reaches.

Everything is computed in float64 on the CPU, whatever the model's dtype. docs/equivalence.md
derives what stands here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..tuner.adapter import SteeringAdapter
from ..tuner.layer import FSRLLayer
from .boundaries import Exit, Geometry, Half
from .encoders import NotAffineError, affine_input, feature_encoder, ranking_distances

if TYPE_CHECKING:
    from jaxtyping import Float, Int8

# How a feature acts at a token.
REST, PROMOTED, SUPPRESSED, CLIPPED = 0, 1, -1, 2
NOWHERE = "none"
# What rounding does to a sum of products, in units of the norms of what is multiplied: many times
# what was seen, and many times less than what anybody would call an error.
ROUNDING = 8 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Piece:
    """The affine piece around one token.

    Attributes:
        radius: Euclidean distance within which the piece is exact; infinite if everywhere.
        tight: no larger radius would do. Where the nearest boundary is one of a top-k selection, of
            an encoder of which nothing is known, or of two rows that are all but opposite, the
            radius is safe but may be too small.
        direction: unit vector to the nearest boundary; zero where there is none, or where it is
            known only that it is not nearer.
        beyond: unit vector from there to where the piece has ended; or zero.
        boundary: what lies there: ``"threshold"`` (a pre-activation of the adapter reaches its
            threshold), ``"clamp"`` (``f + v`` reaches zero), ``"encoder"`` (a feature that is being
            suppressed switches off), ``"suppression"`` (a feature that is not steered comes to be
            suppressed, which takes ``v < 0`` and ``f > 0``), or ``"none"``.
        boundary_feature: index in the whole SAE of its feature; -1 if there is none.
        state: how each feature acts: not at all (0), by ``v > 0`` (1), by ``v < 0`` (-1), or by
            ``-f``, because ``f > 0 >= f + v`` (2).
    """

    radius: float
    tight: bool
    direction: Float[Tensor, "d_in"] = field(repr=False)
    beyond: Float[Tensor, "d_in"] = field(repr=False)
    boundary: str
    boundary_feature: int
    state: Int8[Tensor, "n_features"] = field(repr=False)


class Factors(NamedTuple):
    """``x' = x + B (A x + o)``; columns of ``B`` in the order active, clipped."""

    lora_A: Float[Tensor, "rank d_in"]
    lora_B: Float[Tensor, "d_in rank"]
    offset: Float[Tensor, "rank"]


@dataclass(frozen=True)
class _Token:
    """Where one token stands, per steered feature.

    ``u`` is the pre-activation, times the gain where there is one.
    ``gap`` is by how much the encoder's pre-activation exceeds its threshold, ``until_switch`` a
    distance within which a feature goes neither on nor off.
    """

    u: Tensor
    v: Tensor
    f: Tensor
    gap: Tensor
    until_switch: Tensor


def exact_layer(layer: FSRLLayer, adapter_name: str) -> FSRLLayer:
    """A float64 copy on the CPU of what an adapter does, around the identity.

    Raises:
        ValueError: while edits are in force.
    """
    if layer.edits:
        raise ValueError(
            f"Steering at '{layer.layer_name}' is being edited, and an edit's effect on other "
            "inputs is unknown. Leave the `with` block of peft_fsrl.steering first."
        )
    exact = FSRLLayer(nn.Identity(), layer.layer_name)
    adapter = copy.deepcopy(layer.fsrl_adapter[adapter_name])
    exact.fsrl_adapter[adapter_name] = adapter.to("cpu", torch.float64)
    exact.fsrl_sae[adapter_name] = layer.fsrl_sae[adapter_name].to(
        torch.device("cpu"), torch.float64
    )
    exact.set_adapter(adapter_name, inference_mode=True)
    return exact.requires_grad_(False).eval()


class PiecewiseAffine:
    """What an adapter does to its layer's output, one affine piece per token.

    Raises:
        NotAffineError: if the SAE normalizes when it runs.
        ValueError: while edits are in force.
    """

    def __init__(self, layer: FSRLLayer, adapter_name: str) -> None:
        self.exact = exact_layer(layer, adapter_name)
        adapter = self.exact.fsrl_adapter[adapter_name]
        assert isinstance(adapter, SteeringAdapter)
        self._adapter = adapter
        self.sae = self.exact.fsrl_sae[adapter_name]
        scale, shift = affine_input(self.sae)
        weight = adapter.weight if adapter.down is None else adapter.weight @ adapter.down
        self._gain, self._threshold = torch.ones_like(adapter.bias), torch.zeros_like(adapter.bias)
        two_sided = adapter.activation == "soft_threshold"
        threshold = adapter.threshold_parameter
        if adapter.activation == "gain":
            assert threshold is not None
            self._gain = threshold
        elif threshold is not None:
            self._threshold = threshold.clamp(min=0) if two_sided else threshold.exp()
        # gain * relu(u) is gain * u where that has the gain's sign: what follows has u times it.
        self._rows = weight * scale * self._gain[:, None]
        shifted = functional.steering_pre(shift, adapter.weight, adapter.bias, adapter.down)
        self._offset = shifted * self._gain
        # Which features v can raise, and which it can lower.
        self._rises, self._falls = self._gain > 0, (self._gain < 0) | two_sided
        lowers = bool(self._falls.any())
        self._clamps = lowers and adapter.non_negative and not self.sae.signed
        # How much of a crossed threshold the steering vector lacks: all of it, or nothing.
        self._shrinkage = self._threshold * two_sided
        self.directions = self.sae.directions
        self._sizes = self.directions.norm(dim=1)
        self._writes = self._sizes > 0
        self._encoder = feature_encoder(self.sae) if self._clamps else None
        rows = {"u": self._rows}
        self._noise_v = _Noise(self._rows, self._offset.abs() + self._threshold, shift / scale)
        self._noise_f = None
        if self._encoder is not None:
            encoder, chosen = self._encoder, self._encoder.chosen
            rows["z"] = self._encoder_rows = chosen(encoder.rows)
            self._slope, self._lost = chosen(encoder.slope), chosen(encoder.constant)
            rows["u+f"] = self._rows + self._slope[:, None] * rows["z"]
            # What an active feature's activation exceeds.
            self._least = chosen(encoder.slope * encoder.threshold + encoder.intercept)
            by_f = self._slope[:, None] * rows["z"]
            self._noise_f = _Noise(by_f, self._lost.abs(), shift / scale)
        self._geometry = Geometry(rows)

    def departures(
        self, state: Int8[Tensor, "n_features"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch n_features"]:
        """How much more the layer adds to each feature at ``x`` than its formula in a piece says.

        Zero for what rounding explains, and for features that write nothing.
        """
        _, v, f = self._activations(x, needs_f=True)
        acts = functional.clamped_update(v, f) if self._clamps else v
        by_v = x @ self._rows.T + self._offset - self._shrinkage * state
        formula = torch.where(state.abs() == 1, by_v, 0)
        if self._encoder is not None:
            by_f = self._slope * (x @ self._encoder_rows.T) + self._lost
            formula = torch.where(state == CLIPPED, -by_f, formula)
        more = acts - formula
        clips = ((acts != v) & (f > 0)) | (state == CLIPPED)
        noise = self._feature_noise(
            ~clips | (state.abs() == 1), clips, x.norm(dim=-1, keepdim=True)
        )
        return torch.where(self._writes & (more.abs() > noise), more, 0)

    def noise(self, state: Int8[Tensor, "n_features"], norm: float) -> float:
        """What rounding may do to ``x'`` of a piece at a token of this norm."""
        noise = self._feature_noise(state.abs() == 1, state == CLIPPED, torch.tensor(norm))
        return ROUNDING * norm + float((noise * self._sizes).norm())

    def slope_noise(self, state: Int8[Tensor, "n_features"]) -> float:
        """What rounding may do to the image of a unit vector under the Jacobian of a piece."""
        noise = torch.where(state.abs() == 1, self._noise_v.slope, 0)
        if self._noise_f is not None:
            noise = noise + torch.where(state == CLIPPED, self._noise_f.slope, 0)
        return ROUNDING + float((noise * self._sizes).norm())

    def factors(self, state: Int8[Tensor, "n_features"]) -> Factors:
        """``A``, ``B`` and ``o`` of a piece."""
        active, clipped = positions(state)
        lora_A = self._rows[active]
        offset = self._offset[active] - self._shrinkage[active] * state[active]
        if len(clipped):
            assert self._encoder is not None
            slope = self._slope[clipped, None]
            lora_A = torch.cat([lora_A, slope * self._encoder_rows[clipped]])
            offset = torch.cat([offset, self._lost[clipped]])
        lora_B = torch.cat([self.directions[active], -self.directions[clipped]]).T
        return Factors(lora_A, lora_B, offset)

    def piece(self, x: Float[Tensor, "d_in"]) -> Piece:
        """The piece that one token is on.

        Args:
            x: the wrapped module's own output at that token.

        Raises:
            NotAffineError: if a feature is suppressed there and the SAE's encoder is not one of
                those that are affine feature by feature.
        """
        token = self._locate(x)
        state = (token.v > 0).to(torch.int8)
        down = token.v < 0
        if self._clamps:
            # A feature that the SAE does not find has nothing to lose: it adds no column.
            down = down & (token.f > 0)
            state[down & (token.v <= -token.f)] = CLIPPED
            down = down & (token.v > -token.f)
        state[down] = SUPPRESSED
        return self._reach(token, state)

    def _activations(self, x: Tensor, needs_f: bool) -> tuple[Tensor, Tensor, Tensor]:
        adapter = self._adapter
        pre = self.sae.process_in(x)
        u = functional.steering_pre(pre, adapter.weight, adapter.bias, adapter.down)
        v, _ = functional.steering_vector(
            u,
            adapter.threshold_parameter,
            activation=adapter.activation,
            bandwidth=adapter.bandwidth,
        )
        u = u * self._gain
        if not (self._clamps and needs_f):
            return u, v, torch.zeros_like(u)
        # Each token as a sequence of its own, for encoders that read whole sequences.
        return u, v, self.sae.encode(x.reshape(-1, 1, x.shape[-1])).reshape(u.shape)

    def _locate(self, x: Tensor) -> _Token:
        encoder = self._encoder
        u, v, f = self._activations(x, needs_f=encoder is not None)
        zero = torch.zeros_like(u)
        if encoder is None:
            suppressed = int((v < 0).sum())
            if self._clamps and suppressed:
                raise NotAffineError(
                    f"{suppressed} features are suppressed, and how far below zero they would "
                    f"go is decided by an encoder ({self.sae.info.architecture}) that is not "
                    "affine feature by feature."
                )
            return _Token(u, v, f, zero, zero)
        z = encoder.rows @ x + encoder.offset
        gap = z - encoder.threshold
        norm = encoder.rows.norm(dim=1)
        switch = torch.where(norm > 0, gap.abs() / norm, torch.inf)
        if encoder.k is not None:
            inside, ranking = ranking_distances(encoder, z)
            on = gap > 0
            # To go off it is enough that one of both fails; to come on, both must hold.
            switch = torch.where(
                on & inside,
                torch.minimum(switch, ranking),
                torch.maximum(torch.where(on, 0, switch), torch.where(inside, 0, ranking)),
            )
        return _Token(u, v, f, encoder.chosen(gap), encoder.chosen(switch))

    def _reach(self, token: _Token, state: Tensor) -> Piece:
        nearest: tuple[float, bool, Exit | None, int] = (torch.inf, True, None, -1)
        for exit in self._exits(token, state):
            # Whatever becomes of a feature that writes nothing, the piece goes on.
            exit = exit._replace(where=exit.where & self._writes)
            distance, known = self._geometry.distance(exit, self._bounds(token, exit))
            feature = int(distance.argmin())
            if float(distance[feature]) < nearest[0]:
                nearest = float(distance[feature]), bool(known[feature]), exit, feature
        radius, tight, found, feature = nearest
        direction = beyond = torch.zeros(self.sae.info.d_in, dtype=torch.float64)
        if found is None:
            return Piece(radius, True, direction, beyond, NOWHERE, -1, state)
        if tight:
            direction, beyond = self._geometry.direction(found, feature)
        index = int(self.sae.feature_index[feature])
        return Piece(radius, tight, direction, beyond, found.boundary, index, state)

    def _exits(self, token: _Token, state: Tensor) -> Iterator[Exit]:
        """Every way in which a feature comes to act by another formula than here."""
        u, theta, gap = token.u, self._threshold, token.gap
        resting, up, free, clipped = (
            state == kind for kind in (REST, PROMOTED, SUPPRESSED, CLIPPED)
        )
        # Without a threshold v is u on both sides of zero: nothing ends there by itself.
        straight = (theta == 0) & self._rises & self._falls
        yield Exit("threshold", resting & self._rises, (Half("u", 1, theta - u),))
        yield Exit("threshold", up & ~straight, (Half("u", -1, u - theta),))
        yield Exit("threshold", free & ~straight, (Half("u", 1, -theta - u),))
        goes_down, falls = Half("u", -1, u + theta), resting & self._falls
        if not self._clamps:
            yield Exit("threshold", falls & ~straight, (goes_down,))
            return
        goes_off, goes_on = Half("z", -1, gap), Half("z", 1, -gap)
        by_v = (up | free) & straight
        yield Exit("suppression", falls, (goes_down, goes_on))
        yield Exit("encoder", by_v, (goes_down, goes_off))
        if self._encoder is None:
            return
        yield Exit("encoder", (free & ~straight) | clipped, (goes_off,))
        left = u + theta + self._slope * gap + self._least
        yield Exit("clamp", free & ~straight, (Half("u+f", -1, left),))
        yield Exit("clamp", clipped, (Half("u+f", 1, -left),))
        yield Exit("clamp", by_v, (Half("u+f", -1, left), goes_on))

    def _bounds(self, token: _Token, exit: Exit) -> dict[str, Tensor]:
        """What stands in for the encoder's rows where features compete or nothing is known."""
        if self._encoder is not None and self._encoder.k is None:
            return {}
        for half in exit.halves:
            if half.row == "z":
                on = token.f > 0 if self._encoder is not None else torch.ones_like(exit.where)
                return {"z": torch.where(on == (half.sign < 0), token.until_switch, 0)}
        return {}

    def _feature_noise(self, by_v: Tensor, by_f: Tensor, norm: Tensor) -> Tensor:
        """Of what is added to each feature, where it is ``v`` and where it is ``-f``."""
        noise = torch.where(by_v, self._noise_v.at(norm), 0)
        return (
            noise if self._noise_f is None else noise + torch.where(by_f, self._noise_f.at(norm), 0)
        )


class _Noise:
    """What rounding may do to ``rows @ (x + shift) + constant``, per row."""

    def __init__(self, rows: Tensor, constant: Tensor, shift: Tensor) -> None:
        self.slope = ROUNDING * rows.norm(dim=1)
        self._constant = ROUNDING * constant + self.slope * shift.norm()

    def at(self, norm: Tensor) -> Tensor:
        """For an ``x`` of this norm."""
        return self.slope * norm + self._constant


def positions(state: Int8[Tensor, "n_features"]) -> tuple[Tensor, Tensor]:
    """Which features act by ``v``, and which by ``-f``."""
    return (state.abs() == 1).nonzero()[:, 0], (state == CLIPPED).nonzero()[:, 0]
