"""Records as figures. Reads records and nothing else; needs the ``plots`` extra (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .records import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#c2571a", "#2a6f97", "#4f772d", "#7b2d8b")
_CONTROL = "#b8b8b8"


def plot_ablations(summaries: Mapping[str, Sequence[Summary]]) -> Figure:
    """Rise of the SimPO loss when each category's steering is zeroed, one panel per setting.

    Beside each category, as many random features. A bar is the mean over runs, a dot one run.

    Args:
        summaries: runs (for example seeds) by the name of their setting.

    Raises:
        ValueError: if there is no run, or one without ablations.
    """
    import matplotlib.pyplot as plt

    if not summaries or not all(
        runs and all(run.ablations for run in runs) for runs in summaries.values()
    ):
        raise ValueError("Expected at least one run with ablations for every setting.")
    figure, panels = plt.subplots(
        1, len(summaries), figsize=(3.8 * len(summaries), 3.2), sharey=True, squeeze=False
    )
    for panel, (setting, runs) in zip(panels[0], summaries.items(), strict=True):
        names = [ablation.name for ablation in runs[0].ablations]
        for x, name in enumerate(names):
            pairs = [
                (ablation.scores.loss - run.trained.loss, ablation.control_loss - run.trained.loss)
                for run in runs
                for ablation in run.ablations
                if ablation.name == name
            ]
            rises, controls = zip(*pairs, strict=True)
            colours = (_COLOURS[x % len(_COLOURS)], _CONTROL)
            for shift, values, colour in zip((-0.2, 0.2), (rises, controls), colours, strict=True):
                label = "as many random features" if shift > 0 and x == 0 else None
                panel.bar(
                    x + shift, sum(values) / len(values), width=0.36, color=colour, label=label
                )
                panel.plot([x + shift] * len(values), values, "o", color="black", markersize=3)
        panel.set_xticks(range(len(names)), [f"detect {name}" for name in names])
        panel.set_title(setting, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.axhline(0, color="black", linewidth=0.8)
    panels[0][0].set_ylabel("rise of the SimPO loss when zeroed")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure
