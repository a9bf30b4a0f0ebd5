"""Training curves, read from a trainer's saved state."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records import Record

STATE_FILE = "trainer_state.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curve(Record):
    """One logged quantity over a training run, at the steps where it was logged."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class TrainingCurves(Record):
    """What a trainer logged (figure 3): preference losses, l0, margins and what else there is."""

    curves: tuple[Curve, ...]

    def curve(self, name: str) -> Curve:
        """One curve.

        Raises:
            KeyError: if it was not logged.
        """
        return {curve.name: curve for curve in self.curves}[name]


def load_training_curves(path: str | Path) -> TrainingCurves:
    """Everything that a trainer logged more than once or at evaluations, by the names it gave.

    ``loss`` is what was minimized, penalty included; ``preference_loss`` is made here by taking
    ``fsrl/penalty`` off it, and compares with ``eval_loss``, which has no penalty in it.

    Args:
        path: a ``trainer_state.json``, or the folder of a run, where the file of the run itself is
            taken or else that of its last checkpoint.

    Returns:
        One curve per logged name, in alphabetical order. What is not finite is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not JSON, not a trainer's state, or has no logs.
    """
    file = _find(Path(path))
    history = _history(file)
    logged: dict[str, dict[int, float]] = {}
    dropped = 0
    for row in history:
        step = int(row["step"])
        values = {key: value for key, value in row.items() if _is_number(key, value)}
        if "loss" in values:
            values["preference_loss"] = values["loss"] - values.get("fsrl/penalty", 0.0)
        for name, value in values.items():
            if math.isfinite(value):
                logged.setdefault(name, {})[step] = float(value)
            else:
                dropped += 1
    if dropped:
        _log.warning("Left out %d logged values of %s that are nan or inf.", dropped, file)
    if not logged:
        raise ValueError(
            f"Expected logged values in {file}, found none. Was `logging_steps` above the number "
            "of steps?"
        )
    return TrainingCurves(
        tuple(
            Curve(name, tuple(sorted(points)), tuple(points[step] for step in sorted(points)))
            for name, points in sorted(logged.items())
        )
    )


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    checkpoints = sorted(
        path.glob(f"checkpoint-*/{STATE_FILE}"),
        key=lambda file: int("".join(filter(str.isdigit, file.parent.name)) or 0),
    )
    for file in (path / STATE_FILE, *reversed(checkpoints)):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"Expected a trainer's state at {path}, found no {STATE_FILE} in it or its checkpoints. "
        "Trainers write one with every checkpoint and with `trainer.save_state()`."
    )


def _history(file: Path) -> list[dict[str, Any]]:
    try:
        state = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is not JSON ({error}): it may have been cut off. Take the state of another "
            "checkpoint."
        ) from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(
        isinstance(row, dict) and isinstance(row.get("step"), int) for row in history
    ):
        raise ValueError(
            f"Expected the state of a transformers trainer in {file}: a `log_history` whose rows "
            "have a `step`. Found something else."
        )
    return history


def _is_number(key: str, value: Any) -> bool:
    # The last row sums up the run: its `train_loss` is a mean over all steps, not a point.
    about_time = key in ("step", "epoch") or key.startswith(("train_", "total_flos"))
    return not about_time and isinstance(value, int | float) and not isinstance(value, bool)
