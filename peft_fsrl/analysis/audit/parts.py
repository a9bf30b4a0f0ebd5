"""Finished parts of a long analysis on disk, so that a run that ends early loses none of them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...files import require_folder, write_text_atomically
from ..records import from_plain, to_plain

logger = logging.getLogger(__name__)
# Of a base model so many numbers per tensor are read: enough to notice another one.
_SAMPLE = 64


class Parts:
    """Makes each part once: a later run with the same inputs reads what an earlier one finished.

    Args:
        folder: where parts are kept; None keeps none.
        inputs: everything that all parts depend on, as JSON.

    Raises:
        OSError: if nothing can be kept in the folder; before anything is made.
    """

    def __init__(self, folder: str | Path | None, inputs: Any) -> None:
        self._folder = None if folder is None else Path(folder)
        self._inputs = inputs
        if self._folder is not None:
            require_folder(self._folder)

    def make(self, name: str, kind: Any, compute: Callable[[], Any], *inputs: Any) -> Any:
        """A part, from disk if it is there and nothing that it depends on has changed.

        Args:
            name: of the part and of its file.
            kind: its type, a record or a tuple of records.
            compute: makes it.
            inputs: what this part depends on beside what all do, as JSON.
        """
        if self._folder is None:
            return compute()
        path = self._folder / f"{name}.json"
        key = compute_digest([name, self._inputs, inputs])
        found = _read(path, key, kind)
        if found is not None:
            logger.info("Part %r was made before: taken from %s.", name, path)
            return found[0]
        value = compute()
        text = json.dumps({"key": key, "value": to_plain(value)}, indent=1)
        write_text_atomically(path, text)
        return value


def compute_digest(value: Any) -> str:
    """SHA-256 of something that JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_rows(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """SHA-256 over some columns of all rows, read one by one."""
    digest = hashlib.sha256()
    for row in rows:
        cells = [row.get(name) for name in columns]
        digest.update(json.dumps(cells, default=str).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def digest_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of what decides which tokens a text has: the whole tokenizer, or its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return compute_digest([sorted(tokenizer.get_vocab().items()), tokenizer.all_special_ids])
    described = json.loads(backend.to_str())
    # Left behind by whoever called it last.
    described.pop("truncation", None)
    described.pop("padding", None)
    return compute_digest([described, tokenizer.all_special_ids])


def digest_tensors(tensors: Iterable[tuple[str, Tensor]], sample: int | None = None) -> str:
    """SHA-256 over tensors: name, dtype, shape and bytes.

    Args:
        tensors: by name.
        sample: read only so many numbers of each, evenly spread; None reads all.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        data = tensor.detach()
        digest.update(f"{name}:{data.dtype}:{tuple(data.shape)};".encode())
        flat = data.flatten()
        if sample is not None:
            flat = flat[:: max(1, flat.numel() // sample)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_model(model: nn.Module, own: str) -> tuple[str, str]:
    """Of a steered model: SHA-256 of the adapter's tensors, and of a sample of all others.

    Args:
        model: a model with an adapter.
        own: occurs in the names of the adapter's tensors and of no others.
    """
    named = list(model.state_dict().items())
    adapter = [(name.partition(own)[2], tensor) for name, tensor in named if own in name]
    base = [(name, tensor) for name, tensor in named if own not in name]
    return digest_tensors(adapter), digest_tensors(base, _SAMPLE)


def _read(path: Path, key: str, kind: Any) -> tuple[Any] | None:
    try:
        stored = json.loads(path.read_text("utf-8"))
        return (from_plain(kind, stored["value"]),) if stored["key"] == key else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s): this part is made again.", path, error)
        return None
