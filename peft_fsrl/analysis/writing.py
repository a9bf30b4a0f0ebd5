"""Writing results so that nothing of them is lost."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def require_folder(folder: str | Path) -> None:
    """Make a folder, before anything is made that is to lie in it.

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
            f"Expected a folder that can be written in at {folder}, got {error.strerror!r}. Name "
            "another one."
        ) from error


def write_whole(path: str | Path, text: str) -> None:
    """Write a file, with its folder; whoever reads meanwhile finds the old one or the new one.

    Line ends stay as they are in the text.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
