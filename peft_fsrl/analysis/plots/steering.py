"""Limited steering against the learned policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..records import StaticDynamic
from ._style import COLOURS, percent, subplots, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_static_dynamic(record: StaticDynamic) -> Figure:
    """Loss and accuracy against the share of features that may be steered (figure 4).

    Bands are the intervals of the means. The learned policy stands at its own features per token.

    Args:
        record: from ``compare_static_dynamic``.

    Raises:
        ValueError: for a record without levels.
    """
    if not record.dynamic or not record.static:
        raise ValueError("Expected a record with at least one level of each kind.")
    figure, (losses, accuracies) = subplots(2, 1, figsize=(5.2, 5.6), sharex=True)
    kinds = {
        "chosen at each token": (record.dynamic, "o-"),
        "one fixed set": (record.static, "s--"),
    }
    for colour, (label, (levels, style)) in zip(COLOURS, kinds.items(), strict=False):
        x = [level.share for level in levels]
        for panel, intervals in (
            (losses, [level.loss for level in levels]),
            (accuracies, [level.accuracy for level in levels]),
        ):
            values = [interval.value for interval in intervals]
            panel.plot(x, values, style, color=colour, markersize=4, label=label)
            low, high = [i.low for i in intervals], [i.high for i in intervals]
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    l0 = record.learned.l0
    for panel, interval in ((losses, record.learned.loss), (accuracies, record.learned.accuracy)):
        panel.axhline(interval.value, color="black", linewidth=0.8)
        if l0 > 0:
            label = f"learned policy ({l0:.3g} features per token)"
            panel.plot([l0 / record.d_sae], [interval.value], "k*", markersize=10, label=label)
    losses.axhline(record.base_loss, color="black", linewidth=0.8, linestyle=":")
    losses.annotate(
        "no steering",
        (1, record.base_loss),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    losses.set_ylim(0, 1.12 * max(record.base_loss, *(level.loss.high for level in record.static)))
    losses.set_ylabel("SimPO loss")
    accuracies.set_ylabel("preference accuracy")
    shares = sorted({level.share for level in (*record.dynamic, *record.static)})
    accuracies.set_xscale("log")
    accuracies.set_xticks(shares, [percent(share) for share in shares], rotation=30)
    accuracies.minorticks_off()
    accuracies.set_xlabel(f"share of the SAE's {record.d_sae:,} features that may be steered")
    losses.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    tidy((losses, accuracies))
    figure.tight_layout()
    return figure
