"""Descriptions of features from Neuronpedia: its exports, on disk or downloaded."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from xml.etree import ElementTree

from tqdm.auto import tqdm

from ...files import replacing_file
from .source import FeatureLabel, Labels, printable, require_fit

BUCKET = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
# What an id and a file may be called: one step down in a folder, never up or elsewhere.
_NAME = re.compile(r"\w[\w.+-]*", flags=re.ASCII)
_SPACE = re.compile(r"\s+")
# Characters of one explanation. The largest seen, with an embedding, has a tenth.
_LONGEST = 2**20
# Bytes of one answer of the bucket that is no file, and such answers: a page names 1,000 files.
_LARGEST_PAGE = 2**24
_MOST_PAGES = 100


def load_neuronpedia(
    path: str | os.PathLike[str],
    *,
    neuronpedia_id: str | None = None,
    explanation_model: str | None = None,
    d_sae: int | None = None,
) -> Labels:
    """Descriptions from an export: of a feature that has several, the first.

    Both forms are read: JSON lines, as in the public data sets (``batch-0.jsonl.gz``), and the JSON
    list of the API. Of each entry ``index``, ``description``, ``modelId``, ``layer`` and
    ``explanationModelName`` count. Files are read entry by entry, however large they unpack.

    Args:
        path: a file, or a folder of them: ``.jsonl`` or ``.json``, perhaps ``.gz``.
        neuronpedia_id: ``"model/source"``, which the entries must be about.
        explanation_model: take only what this model wrote.
        d_sae: number of features of the SAE that the entries must be about.

    Returns:
        Labels without categories: let a judge categorize them.

    Raises:
        FileNotFoundError: for no such file, or a folder without one.
        ValueError: for a damaged file, entries about another SAE, or none at all.
    """
    path = Path(path).expanduser()
    found: dict[int, FeatureLabel] = {}
    writers: set[str] = set()
    for file in _exports(path):
        for where, entry in _entries(file):
            label, origin, writer = _take(f"{file}, {where}", entry)
            if neuronpedia_id not in (None, origin):
                raise ValueError(
                    f"{file}, {where}: expected a description of {neuronpedia_id}, found one of "
                    f"{origin}. Download the explanations of this SAE."
                )
            writers.add(writer)
            if label.description and explanation_model in (None, writer):
                found.setdefault(label.feature, label)
    if not found:
        by = "" if explanation_model is None else f" by {explanation_model!r}"
        raise ValueError(
            f"{path} has no description{by}; those that wrote some are {sorted(writers)}."
        )
    features = tuple(label for _, label in sorted(found.items()))
    labels = Labels(f"Neuronpedia {neuronpedia_id or path}", (), None, None, features)
    require_fit(labels, d_sae=d_sae, name=str(path))
    return labels


def download_neuronpedia(
    neuronpedia_id: str,
    cache_dir: str | os.PathLike[str],
    *,
    bucket: str = BUCKET,
    progress: bool = True,
) -> Path:
    """Fetch the explanations of an SAE from Neuronpedia's public data sets.

    A file that is there with the right size is not fetched again, so an interrupted download goes
    on where it was. The Hub's client fetches, with its retries and its proxies.

    Args:
        neuronpedia_id: ``"model/source"``, such as ``"gemma-2-2b/12-gemmascope-res-65k"``; an SAE
            of SAELens names it in its config.
        cache_dir: folder for the files.
        bucket: address of the data sets.
        progress: show a progress bar.

    Returns:
        The folder, for ``load_neuronpedia``.

    Raises:
        ValueError: if there are no explanations of that SAE.
        OSError: if the download fails; the files that are complete stay.
    """
    names = neuronpedia_id.split("/")
    if len(names) != 2 or not all(map(_NAME.fullmatch, names)):
        raise ValueError(f"Expected 'model/source' as Neuronpedia's id, got {neuronpedia_id!r}.")
    folder = Path(cache_dir).expanduser().joinpath(*names)
    prefix = f"v1/{neuronpedia_id}/explanations/"
    sizes = _list_files(bucket, prefix)
    if not sizes:
        raise ValueError(
            f"Neuronpedia has no explanations of {neuronpedia_id!r} to download. Look the id up at "
            "https://www.neuronpedia.org, or give the explanations as a file."
        )
    for name, size in tqdm(sizes.items(), desc="explanations", disable=not progress):
        target = folder / name
        if target.is_file() and target.stat().st_size == size:
            continue
        with replacing_file(target) as staged:
            with staged.open("wb") as file:
                file.writelines(_fetch(f"{bucket}/{prefix}{name}", size))
            found = staged.stat().st_size
            if found != size:
                raise OSError(
                    f"{bucket}/{prefix}{name} should have {size} bytes, got {found}. Call again: "
                    "complete files are not fetched twice."
                )
    return folder


def _list_files(bucket: str, prefix: str) -> dict[str, int]:
    """Names of the exports in a folder of a public S3 bucket, with their sizes."""
    sizes: dict[str, int] = {}
    parameters = {"list-type": "2", "prefix": prefix}
    for _ in range(_MOST_PAGES):
        data = b"".join(_fetch(f"{bucket}/", _LARGEST_PAGE, parameters))
        try:
            listing = ElementTree.fromstring(data)
            for item in listing.iterfind("{*}Contents"):
                name = item.findtext("{*}Key", "").removeprefix(prefix)
                if _NAME.fullmatch(name) and name.endswith(_SUFFIXES):
                    sizes[name] = int(item.findtext("{*}Size", "0"))
        except (ElementTree.ParseError, ValueError) as error:
            raise OSError(f"{bucket} sent no list of files ({error}). Try again later.") from error
        token = listing.findtext("{*}NextContinuationToken")
        if token is None:
            return sizes
        parameters["continuation-token"] = token
    raise OSError(
        f"{bucket} lists more than {_MOST_PAGES} pages under {prefix}. Is `bucket` right?"
    )


def _fetch(url: str, most: int, parameters: dict[str, str] | None = None) -> Iterator[bytes]:
    """What is at an address in pieces, up to ``most`` bytes and a little more."""
    from huggingface_hub.utils import http_stream_backoff

    try:
        # Packed answers may unpack to anything.
        plain = {"accept-encoding": "identity"}
        with http_stream_backoff("GET", url, params=parameters, headers=plain) as response:
            response.raise_for_status()
            for piece in response.iter_raw():
                yield piece
                most -= len(piece)
                if most < 0:
                    return
    # The Hub's client raises what its own HTTP library does, and changes that library.
    except Exception as error:
        reason = printable(str(error).partition("\n")[0])
        raise OSError(
            f"Could not fetch {url} ({reason}). Call again: complete files are not fetched twice."
        ) from error


def _exports(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES))
        files = [file for file in files if not file.name.startswith(".")]
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(
            f"Expected an export of Neuronpedia ({', '.join(_SUFFIXES)}) at {path}, found none. "
            "`download_neuronpedia` fetches one."
        )
    return files


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    """Where each entry stands, and the entry."""
    read = _lines if ".jsonl" in file.suffixes else _items
    try:
        open_text: Any = gzip.open if file.suffix == ".gz" else open
        with open_text(file, "rt", encoding="utf-8", newline="\n") as text:
            yield from read(text)
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it and fetch it again.") from error
    except ValueError as error:
        raise ValueError(f"{file}, {error}. Delete the file and fetch it again.") from error


def _lines(text: TextIO) -> Iterator[tuple[str, Any]]:
    for number in itertools.count(1):
        line = text.readline(_LONGEST)
        if not line:
            return
        if line := line.strip():
            entry, end = _decode(line, f"line {number}")
            if end < len(line):
                raise ValueError(f"line {number}: not JSON (more follows the first value)")
            yield f"line {number}", entry


def _items(text: TextIO) -> Iterator[tuple[str, Any]]:
    window = text.read(_LONGEST)
    begin = len(window) - len(window.lstrip())
    if not window.startswith("[", begin):
        raise ValueError(f"expected a list, found {window[begin : begin + 20]!r}")
    at = begin + 1
    for number in itertools.count():
        # What is left is always enough for an entry.
        if len(window) - at < _LONGEST:
            window, at = window[at:] + text.read(_LONGEST), 0
        at = _skip_space(window, at)
        if window.startswith("]", at):
            return
        if number:
            if not window.startswith(",", at):
                raise ValueError(f"entry {number}: not JSON (expected a comma before it)")
            at = _skip_space(window, at + 1)
        entry, at = _decode(window, f"entry {number}", at)
        yield f"entry {number}", entry


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _decode(text: str, where: str, at: int = 0) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: not JSON ({error}), or longer than {_LONGEST:,} characters"
        ) from error


def _take(where: str, entry: Any) -> tuple[FeatureLabel, str, str]:
    """Index and description, id of the SAE, and who wrote it."""
    try:
        index, description = int(entry["index"]), entry["description"]
        origin = printable(f"{entry['modelId']}/{entry['layer']}")
        text = None if description is None else str(description).strip()
        writer = printable(str(entry.get("explanationModelName") or "unknown"))
        return FeatureLabel(index, text, (), None), origin, writer
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected an explanation of Neuronpedia with modelId, layer, index and "
            f"description, found {repr(entry)[:200]}."
        ) from error
