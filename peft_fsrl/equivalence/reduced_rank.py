"""The best affine map of a given rank from streamed second moments, in float64."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class Moments:
    """Count, means and second moments of pairs ``(x, y)``, seen once and not kept.

    They are taken about the mean of the first rows, so that a large common mean costs no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self._shift: Tensor | None = None
        self._d_x = 0

    def update(self, x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> None:
        """Add rows."""
        rows = torch.cat([x.detach(), y.detach()], dim=1).to("cpu", torch.float64)
        if not len(rows):
            return
        if self._shift is None:
            self._d_x, self._shift = x.shape[1], rows.mean(dim=0)
            self._sum = torch.zeros_like(self._shift)
            self._second = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        rows = rows - self._shift
        self.n += len(rows)
        self._sum += rows.sum(dim=0)
        self._second += rows.T @ rows

    @property
    def mean(self) -> tuple[Float[Tensor, "d_x"], Float[Tensor, "d_y"]]:
        """Means of ``x`` and of ``y``."""
        assert self._shift is not None
        mean = self._shift + self._sum / self.n
        return mean[: self._d_x], mean[self._d_x :]

    @property
    def covariance(
        self,
    ) -> tuple[Float[Tensor, "d_x d_x"], Float[Tensor, "d_y d_x"], Float[Tensor, "d_y d_y"]]:
        """Covariances of ``x`` with itself, of ``y`` with ``x``, of ``y`` with itself."""
        mean = self._sum / self.n
        whole, d = self._second / self.n - torch.outer(mean, mean), self._d_x
        return whole[:d, :d], whole[d:, :d], whole[d:, d:]

    @property
    def size(self) -> float:
        """``E ||y||^2``."""
        return float(self.covariance[2].trace() + self.mean[1].square().sum())

    def error(self, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> float:
        """``E ||y - B A x - bias||^2``."""
        (mean_x, mean_y), (xx, yx, yy) = self.mean, self.covariance
        full = lora_B @ lora_A
        left = mean_y - full @ mean_x - bias
        spread = yy.trace() - 2 * (full * yx).sum() + ((full @ xx) * full).sum()
        return max(float(spread + left.square().sum()), 0.0)


@dataclass(frozen=True, eq=False)
class ReducedRank:
    """The affine map of least squared error for every rank at once.

    With the least-squares map ``M``, the best of rank ``r`` is ``U U^T M``, where ``U`` holds the
    ``r`` first eigenvectors of the covariance of ``M x``.

    Attributes:
        full: ``M``.
        directions: all eigenvectors, as columns.
        moments: what it was fitted to.
    """

    full: Float[Tensor, "d_y d_x"]
    directions: Float[Tensor, "d_y d_y"]
    moments: Moments
    intercept: bool

    @property
    def max_rank(self) -> int:
        """The largest rank that there is."""
        return min(self.full.shape)

    def factors(
        self, rank: int
    ) -> tuple[Float[Tensor, "rank d_x"], Float[Tensor, "d_y rank"], Float[Tensor, "d_y"]]:
        """``A``, ``B`` and the bias.

        Raises:
            ValueError: for a rank below 1 or above ``max_rank``.
        """
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"Expected a rank from 1 to {self.max_rank}, got {rank}.")
        lora_B = self.directions[:, :rank]
        lora_A = lora_B.T @ self.full
        mean_x, mean_y = self.moments.mean
        bias = mean_y - lora_B @ (lora_A @ mean_x)
        return lora_A, lora_B, bias if self.intercept else torch.zeros_like(bias)

    def error(self, rank: int) -> float:
        """``E ||y - B A x - bias||^2 / E ||y||^2``: the share of ``y`` that is missed."""
        return self.moments.error(*self.factors(rank)) / self.moments.size


def reduced_rank_regression(
    moments: Moments, *, intercept: bool = True, ridge: float = 0.0
) -> ReducedRank:
    """Fit ``y = B A x + bias``.

    Args:
        moments: of the data.
        intercept: whether there is a bias.
        ridge: added to the covariance of ``x``, in units of its mean eigenvalue. 0 takes the
            least-norm solution.

    Warns:
        UserWarning: for fewer than twice as many rows as ``x`` has columns, without a ridge. On
            other data the fit then errs about twice as much as the best map, or without limit.

    Raises:
        ValueError: if no data was seen, or ``y`` is zero everywhere.
    """
    if not moments.n or not moments.size:
        raise ValueError("Expected tokens at which the adapter changes something, found none.")
    xx, yx, _ = moments.covariance
    if not ridge and moments.n < 2 * len(xx):
        warnings.warn(
            f"{moments.n} tokens are too few to fit a map of {len(xx)} inputs: on other text it "
            f"may be far worse than no LoRA. Give many more than {2 * len(xx)} tokens, or set "
            "`ridge` and measure on `held_out` text.",
            stacklevel=2,
        )
    if not intercept:
        mean_x, mean_y = moments.mean
        xx, yx = xx + torch.outer(mean_x, mean_x), yx + torch.outer(mean_y, mean_x)
    values, vectors = torch.linalg.eigh(xx)
    values = values.clamp(min=0)
    damped = values + ridge * values.mean()
    # Directions in which x does not vary say nothing: they are left out, not divided by.
    kept = values > 1e-12 * values.max()
    inverse = torch.where(kept, 1 / torch.where(kept, damped, 1), 0)
    full = yx @ (vectors * inverse) @ vectors.T
    directions = torch.linalg.eigh(full @ yx.T).eigenvectors.flip(dims=(1,))
    return ReducedRank(full, directions, moments, intercept)
