"""Atomic file writes, and file hashes."""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``path`` at the end of the block.

    Whoever reads meanwhile finds the old file or the new one; so does who looks after the process
    was killed. If the block raises, nothing changes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield unfinished
        move_file(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def move_file(source: Path, target: Path) -> None:
    """Put a file in the place of another on the same file system; its folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # To the disk before the rename: a name must not outlive a power cut that its bytes did not.
    with source.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write a text file, with its folder, as ``replacing_file`` does. Line ends stay as given."""
    with replacing_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="")


def require_folder(folder: str | Path) -> None:
    """Create a folder and check that it is writable, before any work.

    Raises:
        OSError: if nothing can be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            f"Expected a writable folder at {folder}, got {error.strerror!r}. Name another one."
        ) from error


def compute_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
