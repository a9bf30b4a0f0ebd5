"""Resumable work: finished parts are kept on disk and reused while their inputs are unchanged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import require_folder, write_text_atomically
from ..records import from_plain, to_plain
from .content import digest_json

logger = logging.getLogger(__name__)


class Parts:
    """Computes each part once: a later run with the same inputs reads the finished part.

    Args:
        folder: where parts are kept; None keeps none.
        inputs: everything that all parts depend on, as JSON.

    Raises:
        OSError: if nothing can be kept in the folder; before anything is made.
    """

    def __init__(self, folder: Path | None, inputs: Any) -> None:
        self._folder, self._inputs = folder, inputs
        if folder is not None:
            require_folder(folder)

    def make(self, name: str, kind: Any, compute: Callable[[], Any], *inputs: Any) -> Any:
        """A part, read from disk if its inputs are unchanged, else computed and saved.

        Args:
            name: of the part and of its file.
            kind: its type, a record or a tuple of records.
            compute: makes it.
            inputs: what this part depends on beside what all do, as JSON.
        """
        if self._folder is None:
            return compute()
        path, key = self._folder / f"{name}.json", digest_json([name, self._inputs, inputs])
        try:
            stored = json.loads(path.read_text("utf-8"))
            if stored["key"] == key:
                return from_plain(kind, stored["value"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s): this part is computed again.", path, error)
        value = compute()
        write_text_atomically(path, json.dumps({"key": key, "value": to_plain(value)}, indent=1))
        return value
