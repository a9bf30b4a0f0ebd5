"""Tables, titles and paragraphs for a terminal, under 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 98


def paragraph(name: str, text: str) -> str:
    """A text behind a name, its further lines below its first."""
    return textwrap.fill(
        text.strip() or "(nothing)",
        width=WIDTH,
        initial_indent=name,
        subsequent_indent=" " * len(name),
        break_long_words=False,
    )


def title(text: str) -> str:
    """An underlined heading after an empty line."""
    return f"\n{text}\n{'-' * len(text)}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = []
    for row in [headers, *rows]:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)
