"""What zeroing the steering of categories costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..records import Summary
from ._style import COLOURS, CONTROL, subplots, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_ablations(summaries: Mapping[str, Sequence[Summary]]) -> Figure:
    """Rise of the SimPO loss when each category's steering is zeroed, one panel per setting.

    Beside each category, as many random features. A bar is the mean over runs, a dot one run, a
    line its 95 % interval over preference pairs.

    Args:
        summaries: runs (for example seeds) by the name of their setting.

    Raises:
        ValueError: if there is no run, or one without ablations.
    """
    if not summaries or not all(
        runs and all(run.ablations for run in runs) for runs in summaries.values()
    ):
        raise ValueError("Expected at least one run with ablations for every setting.")
    figure, panels = subplots(
        1, len(summaries), figsize=(3.8 * len(summaries), 3.2), sharey=True, squeeze=False
    )
    for panel, (setting, runs) in zip(panels[0], summaries.items(), strict=True):
        names = [ablation.name for ablation in runs[0].ablations]
        for x, name in enumerate(names):
            found = [(run, each) for run in runs for each in run.ablations if each.name == name]
            rises = [ablation.rise for _, ablation in found]
            controls = [ablation.control_loss - run.trained.loss for run, ablation in found]
            places = [0.06 * (place - (len(found) - 1) / 2) for place in range(len(found))]
            colours = (COLOURS[x % len(COLOURS)], CONTROL)
            for shift, values, colour in zip(
                (-0.2, 0.2), ([rise.value for rise in rises], controls), colours, strict=True
            ):
                label = "as many random features" if shift > 0 and x == 0 else None
                panel.bar(
                    x + shift, sum(values) / len(values), width=0.36, color=colour, label=label
                )
                dots = [x + shift + place for place in places]
                panel.plot(dots, values, "o", color="black", markersize=3)
            lines = [x - 0.2 + place for place in places]
            low, high = [rise.low for rise in rises], [rise.high for rise in rises]
            panel.vlines(lines, low, high, color="black", linewidth=0.8)
        panel.set_xticks(range(len(names)), [f"detect {name}" for name in names])
        panel.set_title(setting, fontsize=10)
        panel.axhline(0, color="black", linewidth=0.8)
    panels[0][0].set_ylabel("rise of the SimPO loss when zeroed")
    panels[0][0].legend(frameon=False, fontsize=8)
    tidy(panels[0])
    figure.tight_layout()
    return figure
