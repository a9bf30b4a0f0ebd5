"""FSRL at one layer as a piecewise affine map: which piece a token is on, and how far that reaches.

Everything is computed in float64, whatever the model's dtype. docs/equivalence.md derives what
stands here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..tuner.adapter import SteeringAdapter
from ..tuner.layer import FSRLLayer
from .boundaries import Exit, Geometry, Half
from .encoders import NotAffineError, affine_input, feature_encoder, ranking_distances

if TYPE_CHECKING:
    from jaxtyping import Float

NOWHERE = "none"


class Piece(NamedTuple):
    """The affine piece around one token, ``x' = x + B (A x + o)``.

    Attributes:
        active: positions of the features with ``v != 0`` that act by ``v``.
        clipped: positions of the features that act by ``-f``, because ``f > 0 >= f + v``.
        lora_A: ``A``, shape ``(len(active) + len(clipped), d_in)``.
        lora_B: ``B``, signed columns of the SAE's decoder, shape ``(d_in, ...)``.
        offset: ``o``, shape ``(...,)``.
        radius: within this distance of the token the piece is exact; see ``tight``.
        tight: no larger radius would do. Where the nearest boundary is one of a top-k selection, of
            an encoder of which nothing is known, or of two rows that are all but opposite, the
            radius is safe but may be too small.
        direction: unit vector to the nearest boundary, shape ``(d_in,)``; zero where there is none,
            or where it is known only that it is not nearer.
        beyond: unit vector from there to where the piece has ended, shape ``(d_in,)``; or zero.
        boundary: what lies there: ``"threshold"`` (a pre-activation of the adapter reaches its
            threshold), ``"clamp"`` (``f + v`` reaches zero), ``"encoder"`` (a feature that is being
            suppressed switches off), ``"suppression"`` (a feature that is not steered comes to be
            suppressed, which takes ``v < 0`` and ``f > 0``), or ``"none"``.
        feature: position of the feature whose boundary that is; -1 where there is none.
    """

    active: Tensor
    clipped: Tensor
    lora_A: Float[Tensor, "rank d_in"]
    lora_B: Float[Tensor, "d_in rank"]
    offset: Float[Tensor, "rank"]
    radius: float
    tight: bool
    direction: Float[Tensor, "d_in"]
    beyond: Float[Tensor, "d_in"]
    boundary: str
    feature: int


@dataclass(frozen=True)
class _Token:
    """Where one token stands, per steered feature.

    ``gap`` is by how much the encoder's pre-activation exceeds its threshold, ``until_switch`` a
    distance within which ``on`` cannot change.
    """

    u: Tensor
    v: Tensor
    up: Tensor
    down: Tensor
    gap: Tensor
    f: Tensor
    on: Tensor
    until_switch: Tensor


def exact_layer(layer: FSRLLayer, adapter_name: str) -> FSRLLayer:
    """A float64 copy on the CPU of what an adapter does, around the identity.

    Raises:
        ValueError: while edits are in force.
    """
    if layer.edits:
        raise ValueError(
            f"Steering at '{layer.layer_name}' is being edited, and nothing is known of what an "
            "edit does to other inputs. Leave the `with` block of peft_fsrl.steering first."
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

    Args:
        layer: a steering layer.
        adapter_name: which of its adapters.

    Raises:
        NotAffineError: if the SAE normalises when it runs.
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
        self._rows = weight * scale
        self._offset = functional.steering_pre(shift, adapter.weight, adapter.bias, adapter.down)
        self._two_sided = adapter.activation == "soft_threshold"
        self._clamps = self._two_sided and adapter.non_negative and not self.sae.signed
        self._threshold = torch.zeros_like(adapter.bias)
        threshold = adapter.threshold_parameter
        if threshold is not None:
            self._threshold = threshold.clamp(min=0) if self._two_sided else threshold.exp()
        # How much of a crossed threshold the steering vector lacks: all of it, or nothing.
        self._shrinkage = self._threshold * self._two_sided
        self._directions = self.sae.directions
        self._writes = self._directions.any(dim=1)
        self._encoder = feature_encoder(self.sae) if self._clamps else None
        rows = {"u": self._rows}
        if self._encoder is not None:
            self._slope = self._encoder.chosen(self._encoder.slope)
            # What an active feature's activation exceeds.
            at_threshold = self._encoder.slope * self._encoder.threshold + self._encoder.intercept
            self._least = self._encoder.chosen(at_threshold)
            rows["z"] = self._encoder.chosen(self._encoder.rows)
            rows["u+f"] = self._rows + self._slope[:, None] * rows["z"]
            self._encoder_rows = rows["z"]
        self._geometry = Geometry(rows)

    def piece(self, x: Float[Tensor, "d_in"]) -> Piece:
        """The piece that one token is on.

        Args:
            x: the wrapped module's own output at that token, shape ``(d_in,)``.

        Raises:
            NotAffineError: if a feature is suppressed there and the SAE's encoder is not one of
                those that are affine feature by feature.
        """
        token = self._locate(x.to("cpu", torch.float64))
        free = token.down & (token.v > -token.f) if self._clamps else token.down
        # A feature that the SAE does not find has nothing to lose: it adds no column.
        clipped = token.down & token.on & ~free
        free = free & token.on if self._clamps else free
        acts = token.up | free
        factors = self._factors(token, acts, clipped)
        radius, tight, direction, beyond, boundary, feature = self._reach(token, free, clipped)
        return Piece(*factors, radius, tight, direction, beyond, boundary, feature)

    def _locate(self, x: Tensor) -> _Token:
        adapter = self._adapter
        u = functional.steering_pre(
            self.sae.process_in(x), adapter.weight, adapter.bias, adapter.down
        )
        up = u > self._threshold
        down = (u < -self._threshold) & self._two_sided
        v = torch.where(up, u - self._shrinkage, 0) + torch.where(down, u + self._shrinkage, 0)
        nothing, everything = torch.zeros_like(u), torch.ones_like(up)
        token = _Token(u, v, up, down, nothing, nothing, everything, nothing)
        if not self._clamps:
            return token
        encoder = self._encoder
        if encoder is None:
            if bool(down.any()):
                raise NotAffineError(
                    f"{int(down.sum())} features are suppressed, and how far below zero they would "
                    f"go is decided by an encoder ({self.sae.info.architecture}) that is not "
                    "affine feature by feature."
                )
            return token
        z = encoder.rows @ x + encoder.offset
        gap = z - encoder.threshold
        norm = encoder.rows.norm(dim=1)
        on, switch = gap > 0, torch.where(norm > 0, gap.abs() / norm, torch.inf)
        if encoder.k is not None:
            inside, ranking = ranking_distances(encoder, z)
            # To go off it is enough that one of both fails; to come on, both must hold.
            switch = torch.where(
                on & inside,
                torch.minimum(switch, ranking),
                torch.maximum(torch.where(on, 0, switch), torch.where(inside, 0, ranking)),
            )
            on = on & inside
        f = torch.where(on, encoder.slope * z + encoder.intercept, 0)
        chosen = [encoder.chosen(values) for values in (gap, f, on, switch)]
        return _Token(u, v, up, down, *chosen)

    def _factors(
        self, token: _Token, acts: Tensor, clipped: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        active, cut = acts.nonzero()[:, 0], clipped.nonzero()[:, 0]
        lora_A, offset = self._rows[active], self._offset[active]
        offset = offset - self._shrinkage[active] * token.v[active].sign()
        if len(cut) and self._encoder is not None:
            slope, encoder = self._slope[cut], self._encoder
            lora_A = torch.cat([lora_A, slope[:, None] * self._encoder_rows[cut]])
            lost = slope * encoder.chosen(encoder.offset)[cut]
            offset = torch.cat([offset, lost + encoder.chosen(encoder.intercept)[cut]])
        used = torch.cat([active, cut])
        signs = torch.cat([torch.ones_like(active), -torch.ones_like(cut)]).to(offset.dtype)
        lora_B = (signs[:, None] * self._directions[used]).T
        return active, cut, lora_A, lora_B, offset

    def _reach(
        self, token: _Token, free: Tensor, clipped: Tensor
    ) -> tuple[float, bool, Tensor, Tensor, str, int]:
        """Radius, whether it is tight, direction, what is beyond, boundary and feature."""
        nearest: tuple[float, bool, Exit | None, int] = (torch.inf, True, None, -1)
        for exit in self._exits(token, free, clipped):
            # Whatever becomes of a feature that writes nothing, the piece goes on.
            exit = exit._replace(where=exit.where & self._writes)
            distance, known = self._geometry.distance(exit, self._bounds(token, exit))
            feature = int(distance.argmin())
            if float(distance[feature]) < nearest[0]:
                nearest = float(distance[feature]), bool(known[feature]), exit, feature
        radius, tight, found, feature = nearest
        direction = beyond = torch.zeros(self.sae.info.d_in, dtype=torch.float64)
        if found is None:
            return radius, True, direction, beyond, NOWHERE, -1
        if tight:
            direction, beyond = self._geometry.direction(found, feature)
        return radius, tight, direction, beyond, found.boundary, feature

    def _exits(self, token: _Token, free: Tensor, clipped: Tensor) -> Iterator[Exit]:
        """Every way in which a feature comes to act by another formula than here."""
        u, theta, gap = token.u, self._threshold, token.gap
        resting = ~(token.up | free | clipped)
        # Without a threshold v is u on both sides of zero: nothing ends there by itself.
        straight = (theta == 0) & self._two_sided
        yield Exit("threshold", resting, (Half("u", 1, theta - u),))
        yield Exit("threshold", token.up & ~straight, (Half("u", -1, u - theta),))
        yield Exit("threshold", free & ~straight, (Half("u", 1, -theta - u),))
        if not self._two_sided:
            return
        goes_down = Half("u", -1, u + theta)
        if not self._clamps:
            yield Exit("threshold", resting & ~straight, (goes_down,))
            return
        goes_off, goes_on = Half("z", -1, gap), Half("z", 1, -gap)
        by_v = (token.up | free) & straight
        yield Exit("suppression", resting, (goes_down, goes_on))
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
                return {"z": torch.where(token.on == (half.sign < 0), token.until_switch, 0)}
        return {}
