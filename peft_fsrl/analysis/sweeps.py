"""The table of a sweep: one CSV row per run, read and written as records."""

from __future__ import annotations

import csv
import io
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import write_text_atomically
from ..records import Record


@dataclass(frozen=True)
class SweepPoint(Record):
    """One run of a sweep, a row of its table. Figures are None for a run that failed.

    Attributes:
        stage: the part of the sweep that it belongs to.
        name: of the run, and of its folder.
        layer: the steered layer.
        seed: of data, order and start.
        l1_coeff: weight of the L1 penalty.
        l0_coeff: weight of the L0 penalty.
        loss: held-out preference loss.
        accuracy: held-out preference accuracy.
        l0: steered features per held-out token.
        l1: norm of the steering vector per held-out token.
        perplexity: of sampled answers under the base model; see ``Coherence``.
        perplexity_unsteered: of the base model's own answers.
        repetition: see ``Coherence``.
        distinct_2: see ``Coherence``.
        seconds: wall time.
        command: what was run.
    """

    stage: str
    name: str
    layer: int
    seed: int
    l1_coeff: float
    l0_coeff: float
    loss: float | None
    accuracy: float | None
    l0: float | None
    l1: float | None
    perplexity: float | None
    perplexity_unsteered: float | None
    repetition: float | None
    distinct_2: float | None
    seconds: float | None
    command: str

    @property
    def finished(self) -> bool:
        """Whether the run has its figures."""
        return self.loss is not None


_COLUMNS = [field.name for field in fields(SweepPoint)]
_KINDS = typing.get_type_hints(SweepPoint)


def save_sweep(path: str | Path, points: Iterable[SweepPoint]) -> None:
    """Write a sweep's table atomically."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, _COLUMNS)
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    write_text_atomically(path, file.getvalue())


def load_sweep(path: str | Path) -> tuple[SweepPoint, ...]:
    """The points of a table that ``save_sweep`` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it has other columns, a row of another length, or a cell that is no number
            where one belongs.
    """
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _COLUMNS:
            raise ValueError(
                f"Expected the columns {_COLUMNS} in {path}, found {reader.fieldnames}. Move the "
                "file away: finished runs are not repeated."
            )
        return tuple(_point(row, f"line {reader.line_num} of {path}") for row in reader)


def by_penalty(points: Iterable[SweepPoint]) -> dict[str, tuple[SweepPoint, ...]]:
    """Runs by what made them sparse, as ``plot_variants`` and ``render_variants`` take them.

    ``"L0 penalty"`` has those with an ``l0_coeff``, which only ``jumprelu`` takes, and
    ``"L1 penalty"`` the others. A name without runs is left out.
    """
    points = tuple(points)
    groups = {
        "L1 penalty": tuple(point for point in points if not point.l0_coeff),
        "L0 penalty": tuple(point for point in points if point.l0_coeff),
    }
    return {name: group for name, group in groups.items() if group}


def _point(row: dict[str, str], place: str) -> SweepPoint:
    # csv's marks of a row that is too long or too short.
    if None in row or None in row.values():
        raise ValueError(f"Expected {len(_COLUMNS)} cells in {place}. Mend or remove the row.")
    try:
        return SweepPoint(**{name: _parse(_KINDS[name], text) for name, text in row.items()})
    except ValueError as error:
        raise ValueError(f"In {place}, {error}. Mend or remove the row.") from error


def _parse(kind: Any, text: str) -> Any:
    if typing.get_origin(kind) is types.UnionType:
        return float(text) if text else None
    return kind(text)
