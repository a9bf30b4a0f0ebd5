"""Descriptions of features from Neuronpedia: its exports, on disk or downloaded."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tqdm.auto import tqdm

from ...files import replacing_file
from ..records import FeatureLabel, Labels
from .source import require_fit, select

BUCKET = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


@dataclass(frozen=True)
class NeuronpediaLabels:
    """Neuronpedia's descriptions as a source; see ``load_neuronpedia`` for the arguments.

    They are in no category: let a judge categorise them.
    """

    path: str | os.PathLike[str]
    neuronpedia_id: str | None = None
    explanation_model: str | None = None
    d_sae: int | None = None

    def labels(self, features: Sequence[int] | None = None) -> Labels:
        """See ``LabelSource``."""
        loaded = load_neuronpedia(
            self.path,
            neuronpedia_id=self.neuronpedia_id,
            explanation_model=self.explanation_model,
            d_sae=self.d_sae,
        )
        return select(loaded, features)


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
    ``explanationModelName`` count.

    Args:
        path: a file, or a folder of them: ``.jsonl`` or ``.json``, perhaps ``.gz``.
        neuronpedia_id: ``"model/source"``, which the entries must be about.
        explanation_model: take only what this model wrote.
        d_sae: number of features of the SAE that the entries must be about.

    Returns:
        Labels without categories.

    Raises:
        FileNotFoundError: for no such file, or a folder without one.
        ValueError: for a damaged file, entries about another SAE, or none at all.
    """
    path = Path(path).expanduser()
    descriptions: dict[int, str] = {}
    writers: set[str] = set()
    for where, entry in _entries(path):
        index, description, origin, writer = _take(where, entry)
        if neuronpedia_id not in (None, origin):
            raise ValueError(
                f"{where}: expected a description of {neuronpedia_id}, found one of {origin}. "
                "Download the explanations of this SAE."
            )
        writers.add(writer)
        if description and explanation_model in (None, writer):
            descriptions.setdefault(index, description)
    if not descriptions:
        by = "" if explanation_model is None else f" by {explanation_model!r}"
        raise ValueError(
            f"{path} has no description{by}; those that wrote some are {sorted(writers)}."
        )
    features = tuple(
        FeatureLabel(index, description, (), None)
        for index, description in sorted(descriptions.items())
    )
    labels = Labels(f"Neuronpedia {neuronpedia_id or path}", (), None, None, features)
    require_fit(labels, d_sae=d_sae, name=str(path))
    return labels


def download_neuronpedia(
    neuronpedia_id: str,
    cache_dir: str | os.PathLike[str],
    *,
    bucket: str = BUCKET,
    description: str | None = "Explanations",
) -> Path:
    """Fetch the explanations of an SAE from Neuronpedia's public data sets.

    A file that is there with the right size is not fetched again, so an interrupted download goes
    on where it was. The Hub's client fetches, with its retries and its proxies.

    Args:
        neuronpedia_id: ``"model/source"``, such as ``"gemma-2-2b/12-gemmascope-res-65k"``; an SAE
            of SAELens names it in its config.
        cache_dir: folder for the files.
        bucket: address of the data sets.
        description: shown beside the progress bar; None shows no bar.

    Returns:
        The folder, for ``load_neuronpedia``.

    Raises:
        ValueError: if there are no explanations of that SAE.
        OSError: if the download fails; the files that are complete stay.
    """
    model, _, source = neuronpedia_id.partition("/")
    if not model or not source or {"..", "."} & set(neuronpedia_id.split("/")):
        raise ValueError(f"Expected 'model/source' as Neuronpedia's id, got {neuronpedia_id!r}.")
    folder = Path(cache_dir).expanduser() / model / source
    files = _list_files(bucket, f"v1/{model}/{source}/explanations/")
    if not files:
        raise ValueError(
            f"Neuronpedia has no explanations of {neuronpedia_id!r} to download. Look the id up at "
            "https://www.neuronpedia.org, or give the explanations as a file."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for key, size in tqdm(files.items(), desc=description, disable=description is None):
        target = folder / key.rpartition("/")[2]
        if target.is_file() and target.stat().st_size == size:
            continue
        data = _fetch(f"{bucket}/{key}")
        if len(data) != size:
            raise OSError(
                f"{bucket}/{key} should have {size} bytes, got {len(data)}. Call again: complete "
                "files are not fetched twice."
            )
        with replacing_file(target) as staged:
            staged.write_bytes(data)
    return folder


def _list_files(bucket: str, prefix: str) -> dict[str, int]:
    """Keys of a public S3 bucket, with their sizes."""
    files: dict[str, int] = {}
    token = None
    while True:
        parameters = {"list-type": "2", "prefix": prefix}
        if token is not None:
            parameters["continuation-token"] = token
        data = _fetch(f"{bucket}/", parameters)
        try:
            listing = ElementTree.fromstring(data)
        except ElementTree.ParseError as error:
            raise OSError(f"{bucket} sent no list of files ({error}). Try again later.") from error
        for item in listing.iterfind("{*}Contents"):
            key = item.findtext("{*}Key", "")
            if key.endswith(_SUFFIXES):
                files[key] = int(item.findtext("{*}Size", "0"))
        token = listing.findtext("{*}NextContinuationToken")
        if token is None:
            return files


def _fetch(url: str, parameters: dict[str, str] | None = None) -> bytes:
    from huggingface_hub.utils import http_backoff

    try:
        response = http_backoff("GET", url, params=parameters)
        response.raise_for_status()
    # The Hub's client raises what its own HTTP library does, and changes that library.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"Could not fetch {url} ({reason}). Call again: complete files are not fetched twice."
        ) from error
    content: bytes = response.content
    return content


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
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
    for file in files:
        yield from _entries_of(file)


def _entries_of(file: Path) -> Iterator[tuple[str, Any]]:
    data = file.read_bytes()
    try:
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it and fetch it again.") from error
    if ".jsonl" in file.suffixes:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{file}, line {number}", _parse(line, f"{file}, line {number}")
        return
    content = _parse(text, str(file))
    if not isinstance(content, list):
        raise ValueError(f"{file}: expected a list, found a {type(content).__name__}.")
    for number, entry in enumerate(content):
        yield f"{file}, entry {number}", entry


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}). Delete the file and fetch it again.") from (
            error
        )


def _take(where: str, entry: Any) -> tuple[int, str, str, str]:
    """Index, description, id of the SAE, and who wrote it."""
    try:
        index, description = int(entry["index"]), entry["description"]
        origin = f"{entry['modelId']}/{entry['layer']}"
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected an explanation of Neuronpedia with modelId, layer, index and "
            f"description, found {str(entry)[:200]}."
        ) from error
    text = "" if description is None else str(description).strip()
    return index, text, origin, str(entry.get("explanationModelName") or "unknown")
