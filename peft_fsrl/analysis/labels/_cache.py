"""Answers on disk: one JSON object per line, appended at once and never changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def hash_request(request: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides an answer."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """Answers by the hash of what was asked, in memory and in a file.

    Each answer is one line, written with one call in append mode: a killed process loses at most
    the line that it was writing, which the next reader leaves out, and several processes may share
    a file.

    Args:
        path: the file; None keeps answers in memory alone.

    Raises:
        ValueError: for a file that holds something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self._answers: dict[str, str] = {}
        self._ends_in_newline = True
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> str | None:
        """The answer to a request, if it was ever given."""
        return self._answers.get(key)

    def add(self, key: str, answer: str) -> None:
        """Keep an answer; it is in the file when this returns."""
        self._answers[key] = answer
        if self.path is None:
            return
        line = json.dumps({"key": key, "answer": answer}) + "\n"
        if not self._ends_in_newline:
            line = "\n" + line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())
        self._ends_in_newline = True

    def _read(self, path: Path) -> None:
        text = path.read_bytes()
        self._ends_in_newline = not text or text.endswith(b"\n")
        damaged = 0
        for line in text.splitlines():
            entry = _parse(line)
            if entry is None:
                damaged += bool(line.strip())
            else:
                self._answers[entry[0]] = entry[1]
        if damaged and not self._answers:
            raise ValueError(
                f"Expected a judge's answers in {path}, one JSON object with 'key' and 'answer' "
                "per line, found no such line. Name another file, or a new one."
            )
        if damaged:
            logger.warning(
                "%s: %d incomplete line(s) left out, as a killed process leaves them; %d answers "
                "are good.",
                path,
                damaged,
                len(self._answers),
            )


def _parse(line: bytes) -> tuple[str, str] | None:
    try:
        entry = json.loads(line)
        key, answer = entry["key"], entry["answer"]
    except (ValueError, KeyError, TypeError):
        return None
    return (key, answer) if isinstance(key, str) and isinstance(answer, str) else None
