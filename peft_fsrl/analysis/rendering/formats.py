"""Numbers and texts as a reader sees them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ...records import Interval
from ..labels import Context
from ..layout import clean_text

MISSING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


# What a browser still lays out at once, also without a space in it.
LONGEST = 10_000


def clean(value: Any) -> Any:
    """A text without what HTML cannot carry, and not longer than a page can show."""
    if type(value) is not str:
        return value
    cut = len(value) - LONGEST
    return clean_text(value[:LONGEST]) + (f" ... ({cut:,} more characters)" if cut > 0 else "")


def fixed(value: float | None, digits: int = 3) -> str:
    """With so many decimals, ``3.142``."""
    return _finish(value, f".{digits}f")


def signed(value: float | None, digits: int = 3) -> str:
    """With its sign, ``+3.142``."""
    return _finish(value, f"+.{digits}f")


def signed_seen(value: float | None, digits: int = 3) -> str:
    """Like ``signed``, but what is not zero does not look it: ``+3e-06``."""
    small = value is not None and 0 < abs(value) < 0.5 * 10**-digits
    return _finish(value, "+.1g") if small else signed(value, digits)


def short(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, ``0.00314``."""
    return _finish(value, f".{digits}g")


def percent(value: float | None, digits: int = 1) -> str:
    """As ``31.4 %``."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:.{digits}f}\N{NARROW NO-BREAK SPACE}%".replace("-", _MINUS)


def between(interval: Interval | None, style: str = "signed", digits: int = 3) -> str:
    """An estimate and its interval, ``+0.31 [+0.22, +0.40]``."""
    if interval is None:
        return MISSING
    styles = {"signed": signed, "seen": signed_seen, "fixed": fixed}
    write = {**styles, "percent": percent, "short": short}[style]
    low, high = write(interval.low, digits), write(interval.high, digits)
    return f"{write(interval.value, digits)} [{low}, {high}]"


def thousands(value: int) -> str:
    """As ``65,536``."""
    return f"{value:,}"


def safe_url(url: str | None) -> str | None:
    """The address if a browser may be sent there, else None."""
    try:
        return url if url and urlsplit(url).scheme == "https" else None
    except ValueError:
        return None


@dataclass(frozen=True)
class Scale:
    """Where values stand on a line from ``low`` to ``high``, in percent of its width."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Position of a value, kept on the line."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)


def scale_of(intervals: Iterable[Interval | None], reference: float = 0.0) -> Scale:
    """A line that holds a reference and all intervals, with a little room at both ends."""
    ends = [reference]
    for interval in intervals:
        if interval is not None:
            ends += [v for v in (interval.low, interval.value, interval.high) if math.isfinite(v)]
    room = 0.04 * (max(ends) - min(ends)) or 1.0
    return Scale(min(ends) - room, max(ends) + room)


def shades(context: Context) -> list[tuple[str, int]]:
    """Each token of a context with its activation as a percentage of the largest one there."""
    strongest = max((a for a in context.activations if math.isfinite(a)), default=0.0)
    return [
        (token, round(100 * activation / strongest) if 0 < activation <= strongest else 0)
        for token, activation in zip(context.tokens, context.activations, strict=True)
    ]


def _finish(value: float | None, style: str) -> str:
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else f"{_MINUS}\N{INFINITY}"
    return format(value, style).replace("-", _MINUS)
