"""How much of everything an audit makes."""

from __future__ import annotations

import math
from dataclasses import dataclass

_AT_LEAST_ONE = ("max_new_tokens", "n_listed", "batch_size")
_NONE_OR_MORE = ("n_generations", "n_coherence", "n_random", "n_single", "n_cards", "n_draws")


@dataclass(frozen=True)
class AuditSettings:
    """How much of everything.

    Attributes:
        categories: those of the labels to look at; None for all.
        beta: SimPO's reward scale.
        gamma: SimPO's target margin.
        n_generations: prompts to continue, token by token.
        n_coherence: prompts to answer for the figures of coherence.
        max_new_tokens: length limit of an answer.
        n_random: draws of each random control of an ablation.
        n_single: single features to ablate.
        n_cards: features to show from near, promoted and suppressed.
        n_listed: features to keep in each table of use.
        n_draws: draws of the labels' errors.
        label_mcc: Matthews correlation of the labels' source with the truth, where it is known from
            elsewhere and there is no reference to find it by; None does not redraw the labels then.
        batch_size: pairs per forward pass.
        seed: of everything that is drawn.

    Raises:
        ValueError: for an amount out of range.
    """

    categories: tuple[str, ...] | None = None
    beta: float = 10.0
    gamma: float = 5.0
    n_generations: int = 4
    n_coherence: int = 32
    max_new_tokens: int = 48
    n_random: int = 5
    n_single: int = 20
    n_cards: int = 8
    n_listed: int = 200
    n_draws: int = 200
    label_mcc: float | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for least, names in ((1, _AT_LEAST_ONE), (0, _NONE_OR_MORE)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(
                        f"Expected {name} of {least} or more, got {getattr(self, name)}."
                    )
        if self.label_mcc is not None and not 0 <= self.label_mcc <= 1:
            raise ValueError(f"Expected a label_mcc from 0 to 1, got {self.label_mcc}.")
        if not (math.isfinite(self.beta) and self.beta > 0 and math.isfinite(self.gamma)):
            raise ValueError(
                f"Expected a beta above 0 and a finite gamma, got {self.beta} and {self.gamma}."
            )
