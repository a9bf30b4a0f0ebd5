"""Matrices between tokens and features, in tiles: how to cut them, and sums over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# The matrices between tokens and features are made in tiles of about so many values: enough for
# matrix products to run at full speed, few enough for a processor's cache.
_TILE_VALUES = {"cpu": 2**19}
_LARGE_TILE_VALUES = 2**28
_MOST_TOKENS, _FEWEST_FEATURES = 2048, 256
# An encoder that is not feature-wise gives all features at once, of so many tokens at least.
_WHOLE_VALUES = 2**22
_FEWEST_TOKENS = 128


def tiles(
    n_tokens: int, n_features: int, device: torch.device, n_encoded: int | None = None
) -> Iterator[tuple[slice, list[slice]]]:
    """Cut a matrix between tokens and features.

    Args:
        n_tokens: its rows.
        n_features: its columns.
        device: for which a tile shall be of the right size.
        n_encoded: features that an encoder gives at once, if it cannot give a piece; a tile then
            has all columns.

    Yields:
        Some rows, and the pieces of the columns.
    """
    most = _TILE_VALUES.get(device.type, _LARGE_TILE_VALUES)
    if n_encoded is not None:
        most = max(most, _WHOLE_VALUES)
        for rows in _slices(n_tokens, max(_FEWEST_TOKENS, most // n_encoded)):
            yield rows, [slice(0, n_features)]
        return
    for rows in _slices(n_tokens, max(_MOST_TOKENS, most // n_features)):
        yield rows, _slices(n_features, max(_FEWEST_FEATURES, most // (rows.stop - rows.start)))


def plus(total: Tensor | None, part: Tensor) -> Tensor:
    """A running sum over tiles, in float32 or wider if there is more than one."""
    if total is None:
        return part
    return total.to(torch.promote_types(total.dtype, torch.float32)).add_(part)


class Total:
    """The gradient of a parameter: a sum over tokens, in float32 or wider.

    Args:
        parameter: of any shape that has features first.
        is_needed: otherwise nothing is summed and the value is None.
    """

    def __init__(self, parameter: Tensor | None, is_needed: bool) -> None:
        self.is_needed = is_needed
        self._parameter = parameter
        if is_needed:
            assert parameter is not None
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self._sum = torch.zeros_like(parameter, dtype=wide)

    def add(self, features: slice, part: Tensor | None) -> None:
        """Add to the gradient of some features."""
        if self.is_needed and part is not None:
            self._sum[features] += part

    def add_product(self, features: slice, left: Tensor, right: Tensor) -> None:
        """Add ``left.T @ right``."""
        if not self.is_needed:
            return
        total = self._sum[features]
        device = left.device.type
        is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if is_cast or not left.dtype == right.dtype == total.dtype:
            total += left.T @ right
        else:
            torch.addmm(total, left.T, right, out=total)

    @property
    def value(self) -> Tensor | None:
        """In the dtype of the parameter."""
        if not self.is_needed or self._parameter is None:
            return None
        return self._sum.to(self._parameter.dtype)


def _slices(length: int, most: int) -> list[slice]:
    """Cut into pieces of nearly equal length, none longer than ``most``."""
    n = -(-length // most)
    return [slice(i * length // n, (i + 1) * length // n) for i in range(n)]
