"""A file is the old one or the new one, whatever happens on the way."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from peft_fsrl.files import (
    compute_sha256,
    replacing_file,
    require_folder,
    write_text_atomically,
)


def test_a_file_is_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text_atomically(path, "old\r\n")
    with suppress(OSError), replacing_file(path) as unfinished:
        unfinished.write_text("half of the n")
        assert path.read_bytes() == b"old\r\n"
        raise OSError("disk full")
    assert path.read_bytes() == b"old\r\n"
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"]
    write_text_atomically(path, "new")
    assert path.read_text() == "new"
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"]


def test_the_hash_is_sha256sums(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert compute_sha256(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_a_folder_that_cannot_be_written_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Expected a writable folder"):
        require_folder(tmp_path / "file" / "out")
