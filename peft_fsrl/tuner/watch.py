"""Notices a configured penalty that never reaches the loss."""

from __future__ import annotations

import warnings

from torch import Tensor


class PenaltyWatch:
    """Warns once when an adapter trains but its penalty never reaches the loss.

    Hooks on what a training forward pass gave show whether a backward pass came through the steered
    output, and whether one came through the terms of the penalty. The next training forward pass
    judges: by then the backward pass, if there was one, is over. Compiled passes are not watched.

    Args:
        adapter_name: for the message.
    """

    def __init__(self, adapter_name: str) -> None:
        self._adapter_name = adapter_name
        self._trained = self._penalized = self._warned = False

    def follow(self, output: Tensor, *terms: Tensor | None) -> None:
        """Judge the last training forward pass and watch this one.

        Args:
            output: the steered output, shape ``(..., d_in)``.
            terms: what a penalty would be made of, any shape; None for one that does not exist.
        """
        if self._trained and not self._penalized and not self._warned:
            self._warned = True
            warnings.warn(
                f"FSRL adapter '{self._adapter_name}' has a sparsity penalty in its config, or "
                "a target_l0, but it trains without one: nothing added it to the loss. Make "
                "the trainer with `with_fsrl` (`from peft_fsrl import with_fsrl`; "
                "`with_fsrl(CPOTrainer)(...)`), or set l1_coeff, l2_coeff and l0_coeff to 0 and "
                "target_l0 to None.",
                stacklevel=2,
            )
        self._trained = self._penalized = False
        if self._warned:
            return
        output.register_hook(self._see_training)
        for term in terms:
            if term is not None and term.requires_grad:
                term.register_hook(self._see_penalty)

    def _see_training(self, _: Tensor) -> None:
        self._trained = True

    def _see_penalty(self, _: Tensor) -> None:
        self._penalized = True
