"""Preference losses that several modules use: pure tensor functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float


def simpo_loss(
    margin: Float[Tensor, "pairs"], gamma: float, label_smoothing: float = 0.0
) -> Float[Tensor, "pairs"]:
    """``-log sigmoid(margin - gamma)``: SimPO (arXiv 2405.14734), equation 6.

    Args:
        margin: difference of the rewards, ``beta`` times that of the mean log-probabilities per
            token of the preferred and the other answer, shape ``(pairs,)``.
        gamma: target margin, in units of the reward: TRL's ``simpo_gamma``.
        label_smoothing: share of the pairs taken to be labeled the wrong way round.

    Returns:
        Shape ``(pairs,)``.
    """
    excess = margin - gamma
    return -F.logsigmoid(excess) * (1 - label_smoothing) - F.logsigmoid(-excess) * label_smoothing
