"""Runs of a sweep against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..records import SweepPoint
from ._style import COLOURS, subplots, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_sweep(points: Sequence[SweepPoint], x: str) -> Figure:
    """Held-out loss, and below it steered features per token, against a setting (figure 2).

    A line goes through the means over seeds, a dot is one run. Runs without figures are left out.

    Args:
        points: the runs of one stage of a sweep.
        x: ``"l1_coeff"`` or ``"l0_coeff"`` (on a logarithmic axis), or ``"layer"``.

    Raises:
        ValueError: if no run has figures.
    """
    finished = [point for point in points if point.finished]
    if not finished:
        raise ValueError("Expected at least one finished run, found none.")
    figure, panels = subplots(2, 1, figsize=(4.6, 4.8), sharex=True)
    figures = {"loss": "held-out loss", "l0": "steered features per token"}
    values = sorted({getattr(point, x) for point in finished})
    for panel, colour, (name, label) in zip(panels, COLOURS, figures.items(), strict=False):
        groups = [
            [getattr(point, name) for point in finished if getattr(point, x) == value]
            for value in values
        ]
        means = [sum(group) / len(group) for group in groups]
        panel.plot(values, means, color=colour)
        for value, group in zip(values, groups, strict=True):
            panel.plot([value] * len(group), group, "o", color=colour, markersize=4)
        panel.set_ylabel(label)
        panel.set_ylim(0, 1.08 * max(max(group) for group in groups) or 1)
    if x == "layer":
        panels[1].set_xticks(values)
    elif min(values) > 0:
        panels[1].set_xscale("log")
        panels[1].set_xticks(values, [f"{value:g}" for value in values])
        panels[1].minorticks_off()
    panels[1].set_xlabel(x)
    tidy(panels)
    figure.tight_layout()
    return figure


def plot_variants(variants: Mapping[str, Sequence[SweepPoint]]) -> Figure:
    """Held-out loss against steered features per token, a colour per variant (JumpReLU against L1).

    A dot is a run. The line is the lowest loss that a variant has reached with no more than so many
    features: only there can variants be compared that end at unlike sparsity. Runs without figures
    are left out.

    Args:
        variants: runs by the name of their variant, for example from ``by_penalty``.

    Raises:
        ValueError: if no run has figures, or there are more variants than colours.
    """
    points = {
        name: sorted(
            (run.l0, run.loss) for run in runs if run.loss is not None and run.l0 is not None
        )
        for name, runs in variants.items()
    }
    points = {name: found for name, found in points.items() if found}
    if not 1 <= len(points) <= len(COLOURS):
        raise ValueError(
            f"Expected 1 to {len(COLOURS)} variants with finished runs, got {len(points)}."
        )
    figure, panel = subplots(figsize=(4.8, 3.6))
    widest = max(l0 for found in points.values() for l0, _ in found)
    for colour, (name, found) in zip(COLOURS, points.items(), strict=False):
        l0s, losses = zip(*found, strict=True)
        panel.plot(l0s, losses, "o", color=colour, markersize=4, label=name)
        lowest = [min(losses[: place + 1]) for place in range(len(losses))]
        panel.step([*l0s, widest], [*lowest, lowest[-1]], where="post", color=colour, alpha=0.6)
    # Linear below one, because an adapter that steers nothing has its place too.
    panel.set_xscale("symlog", linthresh=1)
    panel.set_xlim(left=0)
    panel.set_xlabel("steered features per held-out token")
    panel.set_ylabel("held-out loss")
    panel.legend(frameon=False, fontsize=8)
    tidy([panel])
    figure.tight_layout()
    return figure
