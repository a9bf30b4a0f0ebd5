"""A training run as its trainer logged it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..records import Curve, TrainingCurves
from ._style import COLOURS, subplots, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Panels: what each shows, and the logged names of its training and held-out lines.
_PANELS = (
    ("preference loss", "preference_loss", "eval_loss"),
    ("steered features per token", "fsrl/l0", "eval_fsrl/l0"),
    ("reward margin", "rewards/margins", "eval_rewards/margins"),
)


PLOTTED_CURVES = frozenset(name for _, *names in _PANELS for name in names)


def plot_training_curves(curves: TrainingCurves) -> Figure:
    """Preference loss, steered features and margin, training and held-out (figure 3).

    Args:
        curves: from ``load_training_curves``. A panel of which nothing was logged is left out.

    Raises:
        ValueError: if nothing of all this was logged.
    """
    logged = {curve.name: curve for curve in curves.curves}
    panels = [(label, *names) for label, *names in _PANELS if logged.keys() & set(names)]
    if not panels:
        wanted = [name for _, *names in _PANELS for name in names]
        raise ValueError(f"Expected one of the curves {wanted}, found {sorted(logged)}.")
    figure, axes = subplots(
        len(panels), 1, figsize=(5.6, 2.1 * len(panels) + 0.4), sharex=True, squeeze=False
    )
    for axis, (label, training, held_out) in zip(axes[:, 0], panels, strict=True):
        for colour, style, name, kind in (
            (COLOURS[0], "-", training, "training"),
            (COLOURS[1], "o-", held_out, "held-out"),
        ):
            if name in logged:
                curve: Curve = logged[name]
                axis.plot(curve.steps, curve.values, style, color=colour, markersize=4, label=kind)
        axis.set_ylabel(label)
        values = [v for name in (training, held_out) if name in logged for v in logged[name].values]
        if min(values) > 0 and max(values) > 20 * min(values):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=min(0.0, 1.05 * min(values)))
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[-1, 0].set_xlabel("step")
    tidy(axes[:, 0])
    figure.tight_layout()
    return figure
