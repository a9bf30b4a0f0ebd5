"""The weight of the sparsity penalty at each step: warm-up, and control toward a target l0."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..steering import adapter_configs

# Chosen on the model organism; see docs/training.md.
_PULL, _DAMPING, _MEMORY, _LIMIT = 0.05, 4.0, 0.9, 0.1


class PenaltySchedule(TrainerCallback, ExportableState):
    """``scale = min(1, step / warm-up steps) * factor`` on both coefficients of an adapter.

    ``factor`` is 1, unless the config names a ``target_l0``: nobody can guess a coefficient, but a
    sparsity can be named. After every optimizer step ``log factor`` then moves by
    ``pull * log(l0 / target_l0) + damping * change of log l0``, smoothed and limited: up while too
    many features are steered, unless their number is already falling fast enough. Its state is in
    the trainer's checkpoints and continues from there.
    """

    def __init__(self) -> None:
        self.log_factor: dict[str, float] = {}
        self.log_l0: dict[str, float] = {}
        self._seen: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def reset(self) -> None:
        """Begin as a new run does, whatever the weight was moved to in another one."""
        self.log_factor.clear()
        self.log_l0.clear()
        self._seen.clear()

    def scale(self, adapter_name: str, config: Any, state: Any) -> float:
        """The factor of an adapter's coefficients at the step that ``state`` is in."""
        return _warm_up(config, state) * math.exp(self.log_factor.get(adapter_name, 0.0))

    def observe(self, adapter_name: str, l0_total: Tensor, tokens: Tensor) -> None:
        """Take note of how many features one batch steered, summed over so many tokens."""
        total, count = self._seen.get(adapter_name, (0.0, 0.0))
        self._seen[adapter_name] = (total + l0_total, count + tokens)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Continue where the checkpoint that the trainer has just read left off."""
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        for name, value in stored["attributes"].items():
            setattr(self, name, dict(value))
        self._seen.clear()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Move the factor of each adapter that has a target."""
        assert model is not None
        configs = adapter_configs(model)
        for name, (total, count) in self._seen.items():
            config = configs[name]
            # While the penalty is still growing, its shortfall says nothing about the coefficient.
            if config.target_l0 is None or _warm_up(config, state) < 1 or not float(count):
                continue
            now = math.log(max(float(total) / float(count), 1e-3 * config.target_l0))
            before = self.log_l0.get(name, now)
            smooth = _MEMORY * before + (1 - _MEMORY) * now
            move = _PULL * (smooth - math.log(config.target_l0)) + _DAMPING * (smooth - before)
            self.log_l0[name] = smooth
            moved = self.log_factor.get(name, 0.0) + min(max(move, -_LIMIT), _LIMIT)
            self.log_factor[name] = moved
        self._seen.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {},
            "attributes": {"log_factor": dict(self.log_factor), "log_l0": dict(self.log_l0)},
        }


def _warm_up(config: Any, state: Any) -> float:
    steps = math.ceil(config.penalty_warmup_ratio * state.max_steps)
    return min(1.0, state.global_step / steps) if steps else 1.0
