"""The table of a sweep: one CSV row per run, read and written as records."""

from __future__ import annotations

import csv
import io
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..files import write_text_atomically
from .records import SweepPoint

_COLUMNS = [field.name for field in fields(SweepPoint)]
_KINDS = typing.get_type_hints(SweepPoint)


def save_sweep(path: str | Path, points: Iterable[SweepPoint]) -> None:
    """Write a sweep's table; whoever reads meanwhile finds the old one or the new one, whole."""
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
                "file away: runs that have finished are not made again."
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
