"""Distances to where a piece of a piecewise affine map ends: half-spaces, and pairs of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# Squared sine of the angle at which two rows count as opposite.
_OPPOSITE = 1e-6


class Half(NamedTuple):
    """One half-space per feature, ``{delta: sign * row . delta > gap}``; ``row`` is a name."""

    row: str
    sign: int
    gap: Float[Tensor, "n"]


class Exit(NamedTuple):
    """One way in which the features ``where`` leave the piece: into one or two half-spaces."""

    boundary: str
    where: Bool[Tensor, "n"]
    halves: tuple[Half, ...]


class Geometry:
    """Rows of the affine quantities of each feature by name, and distances to half-spaces."""

    def __init__(self, rows: Mapping[str, Float[Tensor, "n d_in"]]) -> None:
        self._rows = rows
        self._squares = {name: row.square().sum(dim=1) for name, row in rows.items()}
        self._products: dict[tuple[str, str], Tensor] = {}

    def distance(
        self, exit: Exit, bounds: Mapping[str, Float[Tensor, "n"]]
    ) -> tuple[Float[Tensor, "n"], Bool[Tensor, "n"]]:
        """Distance of each feature to an exit, and whether it is that and not a lower bound.

        Args:
            exit: where to.
            bounds: by the name of a row that decides nothing by itself (an encoder in which
                features compete, or one that is not known), a distance within which its half-space
                is not entered.
        """
        reach = [
            bounds[half.row] if half.row in bounds else self._to_half(half) for half in exit.halves
        ]
        both = torch.stack(reach).amax(dim=0)
        known = torch.ones_like(exit.where)
        if any(half.row in bounds for half in exit.halves):
            known = ~known
        elif len(exit.halves) == 2:
            both, known = self._to_edge(*exit.halves, both)
        return torch.where(exit.where, both, torch.inf), known

    def direction(
        self, exit: Exit, feature: int
    ) -> tuple[Float[Tensor, "d_in"], Float[Tensor, "d_in"]]:
        """Unit vectors from the token to the nearest point of a feature's exit, and on into it.

        They differ where that point is on an edge: the ray through it may miss the exit.
        """
        normals = torch.stack([half.sign * self._rows[half.row][feature] for half in exit.halves])
        gaps = torch.stack([half.gap[feature] for half in exit.halves])
        step = None
        for i, normal in enumerate(normals):
            foot = gaps[i] * normal / normal.square().sum()
            others = [j for j in range(len(normals)) if j != i]
            if gaps[i] >= 0 and all(foot @ normals[j] >= gaps[j] for j in others):
                # A boundary under the token has a direction too.
                step = normal
        if step is None and len(normals) == 1:
            step = normals[0]
        elif step is None:
            step = torch.linalg.lstsq(normals, gaps[:, None]).solution[:, 0]
        into = (normals / normals.norm(dim=1, keepdim=True)).sum(dim=0)
        return step / step.norm(), into / into.norm()

    def _to_half(self, half: Half) -> Tensor:
        outside = half.gap.clamp(min=0)
        norm = self._squares[half.row].sqrt()
        # A quantity that does not depend on x stays where it is.
        never = (norm == 0) & (half.gap >= 0)
        return torch.where(never, torch.inf, outside / torch.where(norm > 0, norm, 1))

    def _to_edge(self, first: Half, second: Half, both: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to two half-spaces together from that to each of them; whether it is exact."""
        p, q = first.gap, second.gap
        aa, ee = self._squares[first.row], self._squares[second.row]
        inner = first.sign * second.sign * self._product(first.row, second.row)
        # The nearest point of one, if it lies in the other; else the nearest of the common edge.
        inside = (p <= 0) & (q <= 0)
        on_first = (p >= 0) & (p * inner >= q * aa)
        on_second = (q >= 0) & (q * inner >= p * ee)
        single = inside | on_first | on_second | both.isinf()
        # What half-spaces that are all but opposite share is far away, too thin to be looked into,
        # or nothing: a bound is all that is computed.
        spread, least = aa * ee - inner * inner, _OPPOSITE * aa * ee
        gaps = (p * p * ee - 2 * p * q * inner + q * q * aa).clamp(min=0)
        edge = (gaps / torch.maximum(spread, least)).sqrt()
        exact = (inner >= 0) | (spread > least)
        return torch.where(single, both, torch.maximum(both, edge)), exact

    def _product(self, first: str, second: str) -> Tensor:
        key = (first, second)
        if key not in self._products:
            self._products[key] = (self._rows[first] * self._rows[second]).sum(dim=1)
        return self._products[key]
