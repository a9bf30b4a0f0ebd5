"""Tables, titles and paragraphs for a terminal, under 100 columns wide."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

WIDTH = 98
# Control characters (a terminal obeys some of them) and halves of surrogate pairs, which no
# encoding has.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def clean_text(text: str) -> str:
    """A text in which every character can be written and none commands a terminal."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def shorten(text: str, width: int) -> str:
    """A text on one line, cut to a width."""
    line = " ".join(clean_text(text[: 4 * width]).split())
    return line if len(line) <= width and len(text) <= 4 * width else line[: width - 4] + " ..."


def paragraph(name: str, text: str) -> str:
    """A text behind a name, its further lines below its first."""
    return textwrap.fill(
        clean_text(text).strip() or "(nothing)",
        width=WIDTH,
        initial_indent=clean_text(name),
        subsequent_indent=" " * len(name),
        break_long_words=False,
    )


def title(text: str) -> str:
    """An underlined heading after an empty line."""
    return f"\n{text}\n{'-' * len(text)}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right."""
    lines = [[clean_text(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
