"""Label files: CSV for people, JSON for complete records."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...files import write_text_atomically
from ...records import from_plain
from .source import FeatureLabel, Labels, printable, require_fit

# A file may name what is in no category by this word.
_NO_CATEGORY = "other"
# More than any SAE needs, and fewer than Python refuses to read.
_INDEX_DIGITS = 100
_COLUMNS = ("feature", "category", "description", "quality")


def load_labels(
    path: str | os.PathLike[str], *, d_sae: int | None = None, fingerprint: str | None = None
) -> Labels:
    """Labels from a file.

    - CSV in UTF-8 with the columns ``feature`` and ``category``, and perhaps ``description`` and
      ``quality``: a row per feature, with categories separated by ``;``, or a row per feature and
      category. A feature with no category, or ``other``, is known to be in none.
    - JSON: what ``save_labels`` wrote, or a mapping from index to a category, a list of them, or an
      object with ``categories``, ``description`` and ``quality``.

    Args:
        path: ends in ``.csv`` or ``.json``.
        d_sae: number of features of the SAE that the labels must be about.
        fingerprint: of that SAE; checked where the file has one.

    Raises:
        FileNotFoundError: for no such file.
        ValueError: for a file that is empty, damaged, contradicts itself, or is about another SAE;
            with the line, where there is one.
    """
    path = Path(path).expanduser()
    kind = _kind(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of labels at {path}, found none.")
    try:
        text = _decode(path.read_bytes())
        labels = _from_csv(text, path) if kind == ".csv" else _from_json(text, path)
    except ValueError as error:
        what = printable(str(error))
        raise ValueError(f"{path}, {what} Correct it and load the file again.") from error
    require_fit(labels, d_sae=d_sae, fingerprint=fingerprint, name=str(path))
    return labels


def save_labels(labels: Labels, path: str | os.PathLike[str]) -> None:
    """Write labels atomically.

    Args:
        labels: to be written.
        path: ends in ``.json``, which keeps everything, or in ``.csv``, which keeps what
            ``load_labels`` lists.

    Raises:
        ValueError: for another ending, or CSV of a category with ``;`` in its name.
    """
    path = Path(path).expanduser()
    text = labels.to_json() + "\n" if _kind(path) == ".json" else _to_csv(labels)
    write_text_atomically(path, text)


def _kind(path: Path) -> str:
    kind = path.suffix.lower()
    if kind not in (".csv", ".json"):
        raise ValueError(f"Expected a file that ends in .csv or .json, got {path}. Rename it.")
    return kind


def _decode(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: not UTF-8 ({error.reason}).") from error
    if not text.strip():
        raise ValueError("it contains no labels: is it complete?")
    return text


class _Row(NamedTuple):
    """What a file says about a feature, and where."""

    where: str
    feature: Any
    categories: list[str]
    description: str | None = None
    quality: Any = None


def _from_csv(text: str, path: Path) -> Labels:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def rows() -> Iterator[_Row]:
        header = [name.strip().lower() for name in next(reader)]
        if not {*_COLUMNS[:2]} <= set(header) or len(set(header)) < len(header):
            hint = " The values are separated by something other than commas." * (len(header) == 1)
            raise ValueError(
                f"line 1: expected the columns {', '.join(_COLUMNS)} (the last two may be "
                f"missing), each once, found {', '.join(header)}.{hint}"
            )
        for row in filter(None, reader):
            where = f"line {reader.line_num}"
            if len(row) != len(header):
                columns = f"{len(header)} values ({', '.join(header)})"
                raise ValueError(f"{where}: expected {columns}, found {len(row)}.")
            values = dict(zip(header, map(str.strip, row), strict=True))
            names = [name.strip() for name in values["category"].split(";") if name.strip()]
            rest = values.get("description"), values.get("quality")
            yield _Row(where, values["feature"], names, *rest)

    try:
        return _collect(rows(), str(path))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: not CSV ({error}).") from error


def _from_json(text: str, path: Path) -> Labels:
    try:
        content = json.loads(text, object_pairs_hook=_refuse_repeated)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not JSON ({error.msg}): is it complete?") from error
    except RecursionError as error:
        raise ValueError("nested too deeply to be labels: is it the right file?") from error
    if not isinstance(content, dict):
        raise ValueError(
            "expected a mapping from a feature's index to its categories, or what `save_labels` "
            f"writes, found a {type(content).__name__}."
        )
    if "features" not in content:
        return _collect((_json_row(*item) for item in content.items()), str(path))
    try:
        labels: Labels = from_plain(Labels, content)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(
            f"it has 'features' like a file of `save_labels`, but not its form. {error}"
        ) from error
    # Only to be checked: the record itself keeps its source and its order.
    _collect(
        (
            _Row(f"entry of feature {e.feature}", e.feature, [*e.categories], quality=e.quality)
            for e in labels.features
        ),
        str(path),
    )
    return labels


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1 and name.isdigit():
            raise ValueError(f"entry {name!r}: it occurs twice.")
    return dict(pairs)


def _json_row(index: str, value: Any) -> _Row:
    where = f"entry {index[:_INDEX_DIGITS]!r}"
    entry = dict(value) if isinstance(value, dict) else {"categories": value}
    names = entry.pop("categories", entry.pop("category", None))
    names = [names] if isinstance(names, str) else [] if names is None else names
    description, quality = entry.pop("description", None), entry.pop("quality", None)
    texts = isinstance(names, list) and all(isinstance(n, str) for n in [*names, description or ""])
    if entry or not texts:
        raise ValueError(
            f"{where}: expected a category, a list of them, or an object with categories, "
            f"description and quality, found {value!r}."
        )
    names = [name.strip() for name in names if name.strip()]
    return _Row(where, index, names, description, quality)


def _collect(rows: Iterable[_Row], source: str) -> Labels:
    """Labels from statements that must not contradict one another.

    Raises:
        ValueError: naming the place.
    """
    categories: dict[str, None] = {}
    found: dict[int, FeatureLabel] = {}
    said: dict[tuple[int, str | None], str] = {}
    first: dict[int, str] = {}
    for row in rows:
        feature = _index(row)
        here = FeatureLabel(
            feature,
            row.description or None,
            tuple(dict.fromkeys(n for n in row.categories if n.lower() != _NO_CATEGORY)),
            _quality(row),
        )
        categories |= dict.fromkeys(here.categories)
        for name in here.categories or [None]:
            before = said.setdefault((feature, name), row.where)
            if before != row.where:
                what = "no category" if name is None else repr(name)
                raise ValueError(f"{row.where}: feature {feature} has {what} already, in {before}.")
        known = found.setdefault(feature, here)
        start = first.setdefault(feature, row.where)
        if bool(known.categories) != bool(here.categories):
            raise ValueError(
                f"{row.where}: feature {feature} has both a category and none, see {start}."
            )
        for name in ("description", "quality"):
            one, other = getattr(known, name), getattr(here, name)
            if None not in (one, other) and one != other:
                raise ValueError(
                    f"{row.where}: feature {feature} has another {name} in {start}: {one!r}."
                )
        if known is not here:
            found[feature] = FeatureLabel(
                feature,
                known.description or here.description,
                known.categories + here.categories,
                here.quality if known.quality is None else known.quality,
            )
    if not found:
        raise ValueError("it contains no labels: is it complete?")
    features = tuple(label for _, label in sorted(found.items()))
    return Labels(source, tuple(categories), None, None, features)


def _index(row: _Row) -> int:
    text = str(row.feature).strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _INDEX_DIGITS):
        found = repr(row.feature)[:_INDEX_DIGITS]
        raise ValueError(f"{row.where}: expected a feature's index (0 or more), found {found}.")
    return int(text)


def _quality(row: _Row) -> float | None:
    if row.quality in (None, ""):
        return None
    try:
        quality = float(row.quality)
    except (TypeError, ValueError):
        quality = -1.0
    if not 0 <= quality <= 1:
        found = repr(row.quality)
        raise ValueError(f"{row.where}: expected a quality from 0 to 1, found {found}.")
    return quality


def _to_csv(labels: Labels) -> str:
    for name in labels.categories:
        if ";" in name:
            raise ValueError(f"A category named {name!r} cannot be told apart in CSV. Use JSON.")
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(_COLUMNS)
    for label in labels.features:
        quality = "" if label.quality is None else label.quality
        categories = ";".join(label.categories)
        writer.writerow([label.feature, categories, label.description or "", quality])
    return file.getvalue()
