"""Records as figures. Reads records and nothing else; needs the ``plots`` extra (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .records import Correspondence, Summary, SweepPoint

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


def plot_sweep(points: Sequence[SweepPoint], x: str) -> Figure:
    """Held-out loss, and below it steered features per token, against a setting (figure 2).

    A line goes through the means over seeds, a dot is one run. Runs without figures are left out.

    Args:
        points: the runs of one stage of a sweep.
        x: ``"l1_coeff"`` or ``"l0_coeff"`` (on a logarithmic axis), or ``"layer"``.

    Raises:
        ValueError: if no run has figures.
    """
    import matplotlib.pyplot as plt

    finished = [point for point in points if point.finished]
    if not finished:
        raise ValueError("Expected at least one finished run, found none.")
    figure, panels = plt.subplots(2, 1, figsize=(4.6, 4.8), sharex=True)
    figures = {"loss": "held-out loss", "l0": "steered features per token"}
    values = sorted({getattr(point, x) for point in finished})
    for panel, colour, (name, label) in zip(panels, _COLOURS, figures.items(), strict=False):
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
        panel.spines[["top", "right"]].set_visible(False)
    if x == "layer":
        panels[1].set_xticks(values)
    elif min(values) > 0:
        panels[1].set_xscale("log")
        panels[1].set_xticks(values, [f"{value:g}" for value in values])
        panels[1].minorticks_off()
    panels[1].set_xlabel(x)
    figure.tight_layout()
    return figure


def plot_correspondence(record: Correspondence) -> Figure:
    """An adapter as LoRA: rank and radius per token, error against rank, share against features.

    Args:
        record: what was measured.

    Raises:
        ValueError: for a record without tokens or stand-ins.
    """
    import matplotlib.pyplot as plt

    if not record.token_ranks or not record.stand_ins:
        raise ValueError("Expected a record with tokens and with stand-ins.")
    figure, panels = plt.subplots(2, 2, figsize=(8.4, 6.4))
    ranks, radii, errors, features = panels.flat
    n_tokens = len(record.token_ranks)
    counts = [record.token_ranks.count(rank) for rank in range(max(record.token_ranks) + 1)]
    ranks.bar(range(len(counts)), [count / n_tokens for count in counts], color=_COLOURS[1])
    ranks.set(xlabel="rank of the LoRA at a token", ylabel="share of tokens")
    ranks.xaxis.get_major_locator().set_params(integer=True)
    finite = sorted(radius for radius in record.token_radii if radius < float("inf"))
    shares = [(place + 1) / n_tokens for place in range(len(finite))]
    radii.step(finite, shares, where="post", color=_COLOURS[1])
    radii.set(xscale="log", ylim=(0, 1))
    radii.set(xlabel="radius / norm of the token", ylabel="share of tokens below")
    for colour, stand_in in zip(_COLOURS, record.stand_ins, strict=False):
        divergence = [kl / record.base_kl for kl in stand_in.kl]
        missed = f"missed change, {stand_in.target}"
        errors.plot(stand_in.ranks, stand_in.errors, "o-", color=colour, label=missed)
        left = f"KL left, {stand_in.target}"
        errors.plot(stand_in.ranks, divergence, "s--", color=colour, alpha=0.6, label=left)
    errors.set(xscale="log", yscale="log", xlabel="rank of one LoRA for all tokens")
    errors.set_ylabel("share")
    errors.set_xticks(record.stand_ins[0].ranks, [str(r) for r in record.stand_ins[0].ranks])
    errors.minorticks_off()
    errors.legend(frameon=False, fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for values, style, label in (
        (record.spanned, "o-", "in their span"),
        (record.explained, "s--", "explained by the refitted adapter"),
    ):
        features.plot(record.n_features, values, style, color=_COLOURS[0], label=label)
    features.set(xscale="log", ylim=(0, 1.03), xlabel="features chosen blindly")
    features.set_ylabel("share of the squared change")
    features.set_xticks(record.n_features, [str(n) for n in record.n_features])
    features.minorticks_off()
    features.legend(frameon=False, fontsize=8, loc="lower right")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
