"""Records as figures. Reads records and nothing else; needs the ``plots`` extra (matplotlib)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..extras import install_command
from .audit.audit import Audit
from .curves import Curve, TrainingCurves
from .static_dynamic import StaticDynamic
from .summary import Summary
from .sweeps import SweepPoint
from .usage import RankFrequency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..equivalence import Correspondence

COLORS = ("#c2571a", "#2a6f97", "#4f772d", "#7b2d8b")
CONTROL = "#b8b8b8"


def plot_rank_frequencies(records: Sequence[RankFrequency]) -> Figure:
    """Frequency of the steered features against their rank, with the exponential fits (figure 5).

    Args:
        records: one per segment.

    Raises:
        ValueError: for no record, or more than there are colors.
    """
    if not 1 <= len(records) <= len(COLORS):
        raise ValueError(f"Expected 1 to {len(COLORS)} records, got {len(records)}.")
    figure, panel = subplots(figsize=(5.2, 3.6))
    lowest = min(min(record.frequencies) for record in records)
    for color, record in zip(COLORS, records, strict=False):
        label = f"{record.segment.replace('_', ' + ')} ({record.n_features} features)"
        panel.plot(record.ranks, record.frequencies, "o", color=color, markersize=3, label=label)
        fitted = [record.amplitude * math.exp(-record.rate * rank) for rank in record.ranks]
        fit = f"{record.amplitude:.2g} exp(-{record.rate:.2g} rank), R² {record.r_squared:.2f}"
        panel.plot(record.ranks, fitted, color=color, linewidth=1, alpha=0.7, label=fit)
    panel.set_yscale("log")
    # An exponential is a straight line here; one that leaves the data far below says nothing.
    panel.set_ylim(bottom=lowest / 3, top=1.5)
    panel.set_xlabel("rank of the feature")
    panel.set_ylabel("share of tokens on which it is steered")
    panel.legend(frameon=False, fontsize=7)
    tidy([panel])
    figure.tight_layout()
    return figure


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
            colors = (COLORS[x % len(COLORS)], CONTROL)
            for shift, values, color in zip(
                (-0.2, 0.2), ([rise.value for rise in rises], controls), colors, strict=True
            ):
                label = "as many random features" if shift > 0 and x == 0 else None
                panel.bar(
                    x + shift, sum(values) / len(values), width=0.36, color=color, label=label
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
    for color, (label, (levels, style)) in zip(COLORS, kinds.items(), strict=False):
        x = [level.share for level in levels]
        for panel, intervals in (
            (losses, [level.loss for level in levels]),
            (accuracies, [level.accuracy for level in levels]),
        ):
            values = [interval.value for interval in intervals]
            panel.plot(x, values, style, color=color, markersize=4, label=label)
            low, high = [i.low for i in intervals], [i.high for i in intervals]
            panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
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
    accuracies.set_xticks(shares, [_percent(share) for share in shares], rotation=30)
    accuracies.minorticks_off()
    accuracies.set_xlabel(f"share of the SAE's {record.d_sae:,} features that may be steered")
    losses.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    tidy((losses, accuracies))
    figure.tight_layout()
    return figure


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
        for color, style, name, kind in (
            (COLORS[0], "-", training, "training"),
            (COLORS[1], "o-", held_out, "held-out"),
        ):
            if name in logged:
                curve: Curve = logged[name]
                axis.plot(curve.steps, curve.values, style, color=color, markersize=4, label=kind)
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


def plot_losses(runs: Mapping[str, Sequence[TrainingCurves]]) -> Figure:
    """The preference loss on held-out pairs over the steps of training, side by side.

    Args:
        runs: curves by method, one per seed: the line is their mean, thin lines are single ones.

    Raises:
        KeyError: for a run without an evaluation.
    """
    figure, panel = subplots(figsize=(5.6, 3.6))
    for number, (name, found) in enumerate(runs.items()):
        color = f"C{number}"
        curves = [each.curve("eval_loss") for each in found]
        for curve in curves if len(curves) > 1 else ():
            panel.plot(curve.steps, curve.values, color=color, linewidth=0.6, alpha=0.3)
        means = [
            sum(values) / len(curves) for values in zip(*(c.values for c in curves), strict=False)
        ]
        panel.plot(curves[0].steps[: len(means)], means, color=color, label=name)
    panel.set_xlabel("step")
    panel.set_ylabel("preference loss on held-out pairs")
    panel.legend(frameon=False, fontsize=7)
    tidy([panel])
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
    finished = [point for point in points if point.finished]
    if not finished:
        raise ValueError("Expected at least one finished run, found none.")
    figure, panels = subplots(2, 1, figsize=(4.6, 4.8), sharex=True)
    figures = {"loss": "held-out loss", "l0": "steered features per token"}
    values = sorted({getattr(point, x) for point in finished})
    for panel, color, (name, label) in zip(panels, COLORS, figures.items(), strict=False):
        groups = [
            [getattr(point, name) for point in finished if getattr(point, x) == value]
            for value in values
        ]
        means = [sum(group) / len(group) for group in groups]
        panel.plot(values, means, color=color)
        for value, group in zip(values, groups, strict=True):
            panel.plot([value] * len(group), group, "o", color=color, markersize=4)
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
    """Held-out loss against steered features per token, a color per variant (JumpReLU against L1).

    A dot is a run. The line is the lowest loss that a variant has reached with no more than so many
    features: only there can variants be compared that end at unlike sparsity. Runs without figures
    are left out.

    Args:
        variants: runs by the name of their variant, for example from ``by_penalty``.

    Raises:
        ValueError: if no run has figures, or there are more variants than colors.
    """
    points = {
        name: sorted(
            (run.l0, run.loss) for run in runs if run.loss is not None and run.l0 is not None
        )
        for name, runs in variants.items()
    }
    points = {name: found for name, found in points.items() if found}
    if not 1 <= len(points) <= len(COLORS):
        raise ValueError(
            f"Expected 1 to {len(COLORS)} variants with finished runs, got {len(points)}."
        )
    figure, panel = subplots(figsize=(4.8, 3.6))
    widest = max(l0 for found in points.values() for l0, _ in found)
    for color, (name, found) in zip(COLORS, points.items(), strict=False):
        l0s, losses = zip(*found, strict=True)
        panel.plot(l0s, losses, "o", color=color, markersize=4, label=name)
        lowest = [min(losses[: place + 1]) for place in range(len(losses))]
        panel.step([*l0s, widest], [*lowest, lowest[-1]], where="post", color=color, alpha=0.6)
    # Linear below one, because an adapter that steers nothing has its place too.
    panel.set_xscale("symlog", linthresh=1)
    panel.set_xlim(left=0)
    panel.set_xlabel("steered features per held-out token")
    panel.set_ylabel("held-out loss")
    panel.legend(frameon=False, fontsize=8)
    tidy([panel])
    figure.tight_layout()
    return figure


def plot_correspondence(record: Correspondence) -> Figure:
    """An adapter as LoRA: rank and radius per token, error against rank, share against features.

    Args:
        record: what was measured.

    Raises:
        ValueError: for a record without tokens or stand-ins.
    """
    if not record.token_ranks or not record.stand_ins:
        raise ValueError("Expected a record with tokens and with stand-ins.")
    figure, panels = subplots(2, 2, figsize=(8.4, 6.4))
    ranks, radii, errors, features = panels.flat
    n_tokens = len(record.token_ranks)
    counts = [record.token_ranks.count(rank) for rank in range(max(record.token_ranks) + 1)]
    ranks.bar(range(len(counts)), [count / n_tokens for count in counts], color=COLORS[1])
    ranks.set(xlabel="rank of the LoRA at a token", ylabel="share of tokens")
    ranks.xaxis.get_major_locator().set_params(integer=True)
    finite = sorted(radius for radius in record.token_radii if radius < float("inf"))
    shares = [(place + 1) / n_tokens for place in range(len(finite))]
    radii.step(finite, shares, where="post", color=COLORS[1])
    radii.set(xscale="log", ylim=(0, 1))
    radii.set(xlabel="radius / norm of the token", ylabel="share of tokens below")
    for color, stand_in in zip(COLORS, record.stand_ins, strict=False):
        divergence = [kl / record.base_kl for kl in stand_in.kl]
        missed = f"missed change, {stand_in.target}"
        errors.plot(stand_in.ranks, stand_in.errors, "o-", color=color, label=missed)
        left = f"KL left, {stand_in.target}"
        errors.plot(stand_in.ranks, divergence, "s--", color=color, alpha=0.6, label=left)
    errors.set(xscale="log", yscale="log", xlabel="rank of one LoRA for all tokens")
    errors.set_ylabel("share")
    errors.set_xticks(record.stand_ins[0].ranks, [str(r) for r in record.stand_ins[0].ranks])
    errors.minorticks_off()
    errors.legend(frameon=False, fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for values, style, label in (
        (record.spanned, "o-", "in their span"),
        (record.explained, "s--", "explained by the refitted adapter"),
        (record.chance, ":", "in their span by chance"),
    ):
        features.plot(record.n_features, values, style, color=COLORS[0], label=label)
    features.set(xscale="log", ylim=(0, 1.03), xlabel="features chosen blindly")
    features.set_ylabel("share of the squared change")
    features.set_xticks(record.n_features, [str(n) for n in record.n_features])
    features.minorticks_off()
    features.legend(frameon=False, fontsize=8, loc="lower right")
    tidy(panels.flat)
    figure.tight_layout()
    return figure


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
            "Figures need matplotlib, which cannot be imported. Run: " + install_command("plots")
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


def _percent(share: float) -> str:
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
