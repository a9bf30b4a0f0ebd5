"""The audit's section of a model card: put in, replaced, kept only while the weights are the same.

The section stands between two comments, of which the first names the SHA-256 of the weights that
were audited. A card must not praise weights that nobody has looked at.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..files import compute_sha256
from ..tuner.folder import CARD, WEIGHTS

_START = "<!-- fsrl-audit:start weights={} -->"
_END = "<!-- fsrl-audit:end -->"
_SECTION = re.compile(
    rf"\n*{re.escape(_START).replace(re.escape('{}'), '([0-9a-f]{64})')}.*?{re.escape(_END)}\n*",
    flags=re.DOTALL,
)


def put_section(card: str, body: str, weights: str) -> str:
    """A card with its section replaced, or added at the end.

    Args:
        card: Markdown.
        body: of the section, Markdown without comments.
        weights: SHA-256 of the file of weights that it is about.
    """
    return _append(_SECTION.sub("\n\n", card), f"{_START.format(weights)}\n{body.strip()}\n{_END}")


def weights_digest(folder: str | Path) -> str | None:
    """SHA-256 of the file of weights in an adapter's folder; None if it has none."""
    files = [Path(folder, name) for name in WEIGHTS if Path(folder, name).is_file()]
    return compute_sha256(files[0]) if files else None


def keep_section(card: str, folder: str | Path) -> str:
    """A new card with the section of the folder's old one, if that is about the folder's weights.

    Args:
        card: Markdown without a section.
        folder: of the adapter, with the weights that the new card is for.
    """
    path = Path(folder, CARD)
    found = _SECTION.search(path.read_text("utf-8")) if path.is_file() else None
    if found is None or found[1] != weights_digest(folder):
        return card
    return _append(card, found[0].strip())


def drop_stale_section(folder: str | Path) -> None:
    """Take the section out of a folder's card if the folder's weights are not those audited."""
    path = Path(folder, CARD)
    text = path.read_text("utf-8") if path.is_file() else ""
    found = _SECTION.search(text)
    if found is not None and found[1] != weights_digest(folder):
        path.write_text(_SECTION.sub("\n\n", text).rstrip() + "\n", "utf-8")


def _append(card: str, section: str) -> str:
    return f"{card.rstrip()}\n\n{section}\n" if card.strip() else f"{section}\n"
