"""How often features are steered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..records import RankFrequency
from ._style import COLOURS, subplots, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_rank_frequencies(records: Sequence[RankFrequency]) -> Figure:
    """Frequency of the steered features against their rank, with the exponential fits (figure 5).

    Args:
        records: one per segment.

    Raises:
        ValueError: for no record, or more than there are colours.
    """
    if not 1 <= len(records) <= len(COLOURS):
        raise ValueError(f"Expected 1 to {len(COLOURS)} records, got {len(records)}.")
    figure, panel = subplots(figsize=(5.2, 3.6))
    lowest = min(min(record.frequencies) for record in records)
    for colour, record in zip(COLOURS, records, strict=False):
        label = f"{record.segment.replace('_', ' + ')} ({record.n_features} features)"
        panel.plot(record.ranks, record.frequencies, "o", color=colour, markersize=3, label=label)
        fitted = [record.amplitude * math.exp(-record.rate * rank) for rank in record.ranks]
        fit = f"{record.amplitude:.2g} exp(-{record.rate:.2g} rank), R² {record.r_squared:.2f}"
        panel.plot(record.ranks, fitted, color=colour, linewidth=1, alpha=0.7, label=fit)
    panel.set_yscale("log")
    # An exponential is a straight line here; one that leaves the data far below says nothing.
    panel.set_ylim(bottom=lowest / 3, top=1.5)
    panel.set_xlabel("rank of the feature")
    panel.set_ylabel("share of tokens on which it is steered")
    panel.legend(frameon=False, fontsize=7)
    tidy([panel])
    figure.tight_layout()
    return figure
