"""The only file that imports matplotlib (extra ``plots``), and what all figures share."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

COLOURS = ("#c2571a", "#2a6f97", "#4f772d", "#7b2d8b")
CONTROL = "#b8b8b8"


def subplots(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """``matplotlib.pyplot.subplots``.

    Raises:
        ImportError: without the ``plots`` extra.
    """
    return _pyplot().subplots(*args, **kwargs)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Figures need matplotlib, which cannot be imported. Run: pip install peft-fsrl[plots]"
        ) from error
    return pyplot


def require_plots() -> None:
    """Find out at once whether figures can be drawn.

    Raises:
        ImportError: without the ``plots`` extra.
    """
    _pyplot()


def tidy(panels: Iterable[Any]) -> None:
    """Take away the frame's upper and right side."""
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)


def percent(share: float) -> str:
    """A share as a percentage, without digits that say nothing."""
    return f"{100 * share:.3g} %"


def to_svg(figure: Any) -> str:
    """A figure as an SVG document, its words as text, always the same for the same figure."""
    from matplotlib import pyplot, rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "peft_fsrl"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    return file.getvalue()
