"""Records: frozen dataclasses that convert to JSON and back."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar

RecordT = TypeVar("RecordT", bound="Record")


@dataclass(frozen=True)
class Record:
    """Base of all records."""

    def to_json(self) -> str:
        """The record as indented JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls: type[RecordT], text: str) -> RecordT:
        """The record that ``to_json`` wrote.

        Raises:
            ValueError: if the text is not JSON, or lacks a field of the record, or has another.
        """
        return typing.cast(RecordT, from_plain(cls, json.loads(text)))


@dataclass(frozen=True)
class Interval(Record):
    """An estimate and its confidence interval.

    Attributes:
        value: the estimate.
        low: lower end of the interval.
        high: its upper end.
        level: confidence, for example 0.95.
    """

    value: float
    low: float
    high: float
    level: float = 0.95


def to_plain(value: Any) -> Any:
    """Records, or tuples of them, as what JSON can hold."""
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return asdict(value) if isinstance(value, Record) else value


def from_plain(kind: Any, value: Any) -> Any:
    """What ``to_plain`` was given.

    Args:
        kind: its type, such as ``tuple[Usage, ...]``.
        value: what JSON held.

    Raises:
        ValueError: for other fields than the records have.
    """
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"Expected the fields of {kind}, got {value!r}.")
        names = {field.name for field in fields(kind)}
        if set(value) != names:
            raise ValueError(f"{kind} has fields {sorted(names)}, the text has {sorted(value)}.")
        hints = typing.get_type_hints(kind)
        return typing.cast(Any, kind)(**{n: from_plain(hints[n], v) for n, v in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        [inner] = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else from_plain(inner, value)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"Expected a list of {arguments[0]}, got {value!r}.")
        return tuple(from_plain(arguments[0], item) for item in value)
    return kind(value)
