"""An adapter's folder on disk: replaced whole or not at all, and checked when it is read.

A save first writes every file into a staging folder inside the adapter's. Renaming that folder to
``.fsrl_saved`` is the moment from which the new checkpoint counts: whoever finds it, the next
reader or the next save, moves its files into place. A process that is killed leaves the old
checkpoint before that moment and the new one after it, and never the files of both.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CARD = "README.md"
SUMS = "SHA256SUMS"
_STAGING = ".fsrl_saving_"
_SAVED = ".fsrl_saved"
# No save takes this long: a staging folder of that age belongs to a process that was killed.
_ABANDONED_SECONDS = 3600.0
_CHUNK = 1 << 20


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A folder to save an adapter in, whose files replace those of ``folder`` together at the end.

    Adapters in subfolders are replaced one after the other. If the block raises, nothing changes.

    Args:
        folder: the adapter's folder, which is made where it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    staging = folder / f"{_STAGING}{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        if (folder / CARD).is_file():
            # PEFT completes the card that it finds.
            shutil.copy2(folder / CARD, staging / CARD)
        yield staging
        inside = sorted(path.parent for path in staging.rglob(f"*/{CONFIG}"))
        for adapter in reversed(inside):
            _commit(adapter, folder / adapter.relative_to(staging))
        _commit(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def finish_save(folder: str | Path) -> None:
    """Put the files of a save in place that was killed after it was complete, if there is one.

    Raises:
        OSError: for a folder that may not be written.
    """
    folder = Path(folder)
    saved = folder / _SAVED
    if not saved.is_dir():
        return
    files = [path for path in saved.rglob("*") if path.is_file()]
    if any(path.name in WEIGHTS for path in files):
        # Of two kinds of weights PEFT reads the one that may be older.
        for name in WEIGHTS:
            if not (saved / name).exists():
                (folder / name).unlink(missing_ok=True)
    # The config first: where it is still another method's, no reader would come here to finish.
    for path in sorted(files, key=lambda path: (path.name != CONFIG, path)):
        target = folder / path.relative_to(saved)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be doing the same.
        with suppress(FileNotFoundError):
            os.replace(path, target)
    for path in sorted((p for p in saved.rglob("*") if p.is_dir()), reverse=True):
        _remove_if_empty(path)
    _remove_if_empty(saved)


def forget_sums(folder: str | Path) -> None:
    """Remove the checksums of a folder whose files are about to be written by someone else."""
    (Path(folder) / SUMS).unlink(missing_ok=True)


def verify(folder: str | Path) -> None:
    """Compare an adapter's files with the checksums that were saved with them, if they were.

    Raises:
        ValueError: for weights that are not those that were saved, or checksums that cannot be
            read.

    Warns:
        UserWarning: for another file that changed, which may have been edited on purpose.
    """
    folder = Path(folder)
    if not (folder / SUMS).is_file():
        return
    for expected, name in _read_sums(folder / SUMS):
        path = folder / name
        if path.is_file():
            found = compute_sha256(path)
            if found == expected:
                continue
            fact = f"expected SHA-256 {expected[:16]}..., found {found[:16]}..."
        else:
            fact = "expected a file, found none"
        message = (
            f"{name} in {folder} is not what was saved with this adapter: {fact}. It is damaged, "
            "or belongs to another checkpoint: copy it again. If it was changed on purpose, delete "
            f"its line from {SUMS}."
        )
        if name in WEIGHTS:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


def compute_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _commit(staging: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_sums(staging)
    finish_save(folder)
    os.rename(staging, folder / _SAVED)
    finish_save(folder)


def _write_sums(folder: Path) -> None:
    """In the format of ``sha256sum``; not the card, which is for editing, nor an SAE's tensors."""
    names = [name for name in (CONFIG, *WEIGHTS) if (folder / name).is_file()]
    # What an SAE computes has a fingerprint in the adapter's config.
    names += sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/cfg.json"))
    if names:
        lines = [f"{compute_sha256(folder / name)}  {name}\n" for name in names]
        (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _read_sums(path: Path) -> list[tuple[str, str]]:
    rows = [line.split("  ", 1) for line in path.read_text("utf-8", "replace").splitlines()]
    if not all(len(row) == 2 and len(row[0]) == 64 for row in rows):
        raise ValueError(
            f"Expected lines of a SHA-256, two spaces and a name in {path}, as sha256sum writes "
            "them, and found something else. The folder is damaged: copy it again. To load it "
            f"unchecked, delete {SUMS}."
        )
    return [(row[0], row[1]) for row in rows]


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{_STAGING}*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _remove_if_empty(path: Path) -> None:
    # Not `rmtree`: another process may have completed a save here meanwhile.
    with suppress(OSError):
        path.rmdir()
