"""Labels in files: CSV as people write it, and JSON with everything in it."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import write_text_atomically
from ..records import FeatureLabel, Labels
from .source import require_fit, select

# A file may name what is in no category by this word.
_NO_CATEGORY = "other"
# More than any SAE needs, and fewer than Python refuses to read.
_INDEX_DIGITS = 100
_COLUMNS = ("feature", "category", "description", "quality")


@dataclass(frozen=True)
class FileLabels:
    """A file of labels as a source; see ``load_labels`` for the arguments."""

    path: str | os.PathLike[str]
    d_sae: int | None = None
    fingerprint: str | None = None

    def labels(self, features: Sequence[int] | None = None) -> Labels:
        """See ``LabelSource``."""
        loaded = load_labels(self.path, d_sae=self.d_sae, fingerprint=self.fingerprint)
        return select(loaded, features)


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
    text = _read(path)
    if path.suffix.lower() == ".csv":
        labels = _from_csv(text, path)
    elif path.suffix.lower() == ".json":
        labels = _from_json(text, path)
    else:
        raise ValueError(f"Expected a file that ends in .csv or .json, got {path}. Rename it.")
    require_fit(labels, d_sae=d_sae, fingerprint=fingerprint, name=str(path))
    return labels


def save_labels(labels: Labels, path: str | os.PathLike[str]) -> None:
    """Write labels, whole or not at all: what was there before stays until all is written.

    Args:
        labels: to be written.
        path: ends in ``.json``, which keeps everything, or in ``.csv``, which keeps what
            ``load_labels`` lists.

    Raises:
        ValueError: for another ending.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".json":
        text = labels.to_json() + "\n"
    elif path.suffix.lower() == ".csv":
        text = _to_csv(labels)
    else:
        raise ValueError(f"Expected a path that ends in .csv or .json, got {path}.")
    write_text_atomically(path, text)


class _Collected:
    """Labels by feature while a file is read, and where each was said."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._categories: dict[str, None] = {}
        self._features: dict[int, dict[str, Any]] = {}
        self._said: dict[tuple[int, str | None], str] = {}

    def add(self, where: str, row: Mapping[str, Any]) -> None:
        """One statement about one feature.

        Raises:
            ValueError: naming ``where``.
        """
        feature = self._index(where, row["feature"])
        names = [name for name in row["categories"] if name.lower() != _NO_CATEGORY]
        for name in names or [None]:
            before = self._said.setdefault((feature, name), where)
            if before != where:
                what = "no category" if name is None else repr(name)
                raise self.problem(where, f"feature {feature} has {what} already, in {before}")
        entry = self._features.setdefault(feature, {"names": [], "where": where})
        if (entry["names"] and not names) or (names and (feature, None) in self._said):
            raise self.problem(
                where, f"feature {feature} has both a category and none, see {entry['where']}"
            )
        entry["names"] += names
        self._categories.update(dict.fromkeys(names))
        for key, value in (
            ("description", row.get("description") or None),
            ("quality", self._quality(where, row.get("quality"))),
        ):
            known = entry.get(key)
            if None not in (known, value) and known != value:
                raise self.problem(
                    where, f"feature {feature} has another {key} in {entry['where']}: {known!r}"
                )
            entry[key] = value if known is None else known

    def to_labels(self) -> Labels:
        """What was collected.

        Raises:
            ValueError: if it is nothing.
        """
        if not self._features:
            raise ValueError(f"{self._path} has no labels in it. Was it written to the end?")
        features = tuple(
            FeatureLabel(feature, e.get("description"), tuple(e["names"]), e.get("quality"))
            for feature, e in sorted(self._features.items())
        )
        return Labels(str(self._path), tuple(self._categories), None, None, features)

    def problem(self, where: str, what: str) -> ValueError:
        """An error about one place in the file."""
        return ValueError(f"{self._path}, {where}: {what}. Correct it and load the file again.")

    def _index(self, where: str, value: Any) -> int:
        text = str(value).strip()
        plain = text.isascii() and text.isdigit() and len(text) <= _INDEX_DIGITS
        if isinstance(value, bool) or not plain:
            found = repr(value)[:_INDEX_DIGITS]
            raise self.problem(where, f"expected a feature's index (0 or more), found {found}")
        return int(text)

    def _quality(self, where: str, value: Any) -> float | None:
        if value is None or value == "":
            return None
        try:
            quality = float(value)
        except (TypeError, ValueError):
            quality = -1.0
        if not 0 <= quality <= 1:
            raise self.problem(where, f"expected a quality from 0 to 1, found {value!r}")
        return quality


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of labels at {path}, found none.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 ({error.reason}). Save the file in that encoding."
        ) from error
    if not text.strip():
        raise ValueError(f"{path} has no labels in it. Was it written to the end?")
    return text


def _from_csv(text: str, path: Path) -> Labels:
    collected = _Collected(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader)]
        _check_header(header, path)
        for row in reader:
            if not row:
                continue
            where = f"line {reader.line_num}"
            if len(row) != len(header):
                raise collected.problem(
                    where, f"expected {len(header)} values ({', '.join(header)}), found {len(row)}"
                )
            values: dict[str, Any] = dict(zip(header, map(str.strip, row), strict=True))
            categories = [name.strip() for name in values["category"].split(";")]
            collected.add(where, {**values, "categories": list(filter(None, categories))})
    except csv.Error as error:
        raise collected.problem(f"line {reader.line_num}", f"not CSV ({error})") from error
    return collected.to_labels()


def _check_header(header: Sequence[str], path: Path) -> None:
    missing = [name for name in _COLUMNS[:2] if name not in header]
    if missing or len(set(header)) < len(header):
        hint = " The values are separated by something other than commas." * (len(header) == 1)
        raise ValueError(
            f"{path}, line 1: expected the columns {', '.join(_COLUMNS)} (the last two may be "
            f"missing), each once, found {', '.join(header)}.{hint} Name them in the first line."
        )


def _from_json(text: str, path: Path) -> Labels:
    collected = _Collected(path)

    def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        repeated = next((name for name, count in counts.items() if count > 1), None)
        if repeated is not None and repeated.isdigit():
            raise collected.problem(f"entry {repeated!r}", "it stands there twice")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=refuse_repeated)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). Was it written to the end?"
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{path}: nested too deeply to be labels. Is it the right file?"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a mapping from a feature's index to its categories, or what "
            f"`save_labels` writes, found a {type(content).__name__}."
        )
    if "features" in content:
        return _from_record(text, path)
    for index, value in content.items():
        collected.add(f"entry {index!r}", {"feature": index, **_entry(value, index, collected)})
    return collected.to_labels()


def _entry(value: Any, index: str, collected: _Collected) -> dict[str, Any]:
    entry = dict(value) if isinstance(value, dict) else {"categories": value}
    names = entry.pop("categories", entry.pop("category", None))
    names = [names] if isinstance(names, str) else names if names is not None else []
    unknown = set(entry) - {"description", "quality"}
    if unknown or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise collected.problem(
            f"entry {index!r}",
            "expected a category, a list of them, or an object with categories, description and "
            f"quality, found {value!r}",
        )
    return {**entry, "categories": [name.strip() for name in names if name.strip()]}


def _from_record(text: str, path: Path) -> Labels:
    try:
        labels = Labels.from_json(text)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: it has 'features' like a file of `save_labels`, but not its form. {error}"
        ) from error
    collected = _Collected(path)
    for label in labels.features:
        collected.add(
            f"entry of feature {label.feature}",
            {"feature": label.feature, "categories": label.categories, "quality": label.quality},
        )
    # Only to be checked: the record itself keeps its source and its order.
    collected.to_labels()
    return labels


def _to_csv(labels: Labels) -> str:
    for name in labels.categories:
        if ";" in name:
            raise ValueError(f"A category named {name!r} cannot be told apart in CSV. Use JSON.")
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(_COLUMNS)
    writer.writerows(_rows(labels.features))
    return file.getvalue()


def _rows(features: Iterable[FeatureLabel]) -> Iterable[tuple[Any, ...]]:
    for label in features:
        quality = "" if label.quality is None else label.quality
        yield label.feature, ";".join(label.categories), label.description or "", quality
