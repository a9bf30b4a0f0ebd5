"""The figures of an audit's page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..records import Audit
from ._style import to_svg
from .steering import plot_static_dynamic
from .training import PLOTTED_CURVES, plot_training_curves
from .usage import plot_rank_frequencies

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_audit(audit: Audit) -> dict[str, str]:
    """SVG documents by the part of the audit that they show; parts without data are left out.

    Raises:
        ImportError: without the ``plots`` extra.
    """
    makers: dict[str, Callable[[], Figure]] = {}
    if audit.rank_frequencies:
        makers["rank_frequencies"] = lambda: plot_rank_frequencies(audit.rank_frequencies)
    record, curves = audit.static_dynamic, audit.curves
    if record is not None and record.dynamic and record.static:
        makers["static_dynamic"] = lambda: plot_static_dynamic(record)
    if curves is not None and PLOTTED_CURVES & {curve.name for curve in curves.curves}:
        makers["curves"] = lambda: plot_training_curves(curves)
    return {name: to_svg(make()) for name, make in makers.items()}
