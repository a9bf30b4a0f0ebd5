"""Records as plain text. Reads records and nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from .records import Ablation, Generation, PreferenceScores, Summary, SweepPoint, Usage

_WIDTH = 98


def render_summary(summary: Summary, n_features: int = 10) -> str:
    """The summary of a run for a terminal, under 100 columns wide.

    Args:
        summary: from ``compute_summary``.
        n_features: how many of the most used features to list.
    """
    sections = [
        _title(f"Held-out preference pairs ({summary.trained.n})"),
        render_scores(summary.base, summary.trained, summary.usage),
        _title("Most steered features (answer tokens)"),
        render_usage(summary.usage, n_features),
    ]
    if summary.ablations:
        sections += [
            _title("With the steering of some features zeroed"),
            render_ablations(summary.base, summary.trained, summary.ablations),
        ]
    if summary.generations:
        sections += [_title("Samples, same seed"), render_generations(summary.generations)]
    return "\n".join(sections) + "\n"


def render_scores(base: PreferenceScores, trained: PreferenceScores, usage: Usage) -> str:
    """Base against trained: SimPO loss, accuracy, margin, and what the steering costs."""
    rows = [
        ["base", f"{base.loss:.3f}", f"{base.accuracy:.1%}", f"{base.margin:+.2f}", "0"],
        [
            "trained",
            f"{trained.loss:.3f}",
            f"{trained.accuracy:.1%}",
            f"{trained.margin:+.2f}",
            f"{usage.l0:.1f}",
        ],
    ]
    return _table(["", "SimPO loss", "accuracy", "margin", "steered features per token"], rows)


def render_usage(usage: Usage, n_features: int) -> str:
    """The features with the most steering mass and what each detects."""
    rows = [
        [
            str(use.feature),
            use.label or "-",
            "promoted" if use.mean_steering > 0 else "suppressed",
            f"{use.frequency:.1%}",
            f"{use.mean_abs_steering:.4f}",
            f"{use.mean_abs_steering / usage.l1:.1%}",
        ]
        for use in usage.features[:n_features]
    ]
    headers = ["feature", "detects", "mostly", "tokens", "mean |v|", "share of ||v||_1"]
    return _table(headers, rows)


def render_ablations(
    base: PreferenceScores, trained: PreferenceScores, ablations: Sequence[Ablation]
) -> str:
    """Loss and accuracy with each category zeroed, against random features.

    The last two columns are the mean rise without as many random features, and without random
    features of the same steering mass (in brackets the share of it that they reach, where they do
    not reach it).
    """
    gain = base.loss - trained.loss
    rows = [["nothing", "", f"{trained.loss:.3f}", f"{trained.accuracy:.1%}", *[""] * 5]]
    for ablation in ablations:
        rise = ablation.rise
        rows.append(
            [
                textwrap.shorten(ablation.name, 24, placeholder=" ..."),
                str(len(ablation.features)),
                f"{ablation.scores.loss:.3f}",
                f"{ablation.scores.accuracy:.1%}",
                f"{rise.value:+.3f}",
                f"{rise.low:+.2f} to {rise.high:+.2f}",
                f"{rise.value / gain:.0%}" if gain > 0 else "-",
                _mean_rise(ablation.same_count, trained),
                _mean_rise(ablation.same_mass, trained) + _shortfall(ablation),
            ]
        )
    headers = ["features zeroed", "n", "loss", "accuracy", "rise", "95 %", "of gain"]
    return _table([*headers, "n random", "same mass"], rows)


def render_variants(
    variants: Mapping[str, Sequence[SweepPoint]], limits: Sequence[float] = (1, 2, 4, 8, 16)
) -> str:
    """Lowest held-out loss of each variant with no more than so many features per token.

    Args:
        variants: runs by the name of their variant, for example from ``by_penalty``.
        limits: numbers of features per token.
    """
    rows = []
    for limit in limits:
        cells = []
        for points in variants.values():
            found = [
                (point.loss, point.l0)
                for point in points
                if point.loss is not None and point.l0 is not None and point.l0 <= limit
            ]
            cells.append("{:.3f} (l0 {:.2f})".format(*min(found)) if found else "-")
        rows.append([f"{limit:g}", *cells])
    return _table(["l0 at most", *variants], rows)


def _mean_rise(draws: Sequence[PreferenceScores], trained: PreferenceScores) -> str:
    if not draws:
        return "-"
    return f"{sum(draw.loss for draw in draws) / len(draws) - trained.loss:+.3f}"


def _shortfall(ablation: Ablation) -> str:
    reached = max(ablation.random_masses, default=0.0)
    short = ablation.same_mass and reached < 0.9 * ablation.mass
    return f" ({reached / ablation.mass:.0%})" if short else ""


def render_generations(generations: Sequence[Generation]) -> str:
    """Prompt and continuations, one under another."""
    blocks = [
        "\n".join(
            [
                _paragraph("prompt   ", generation.prompt),
                *(
                    _paragraph(f"{answer.name:<9}", answer.text)
                    for answer in generation.continuations
                ),
            ]
        )
        for generation in generations
    ]
    return "\n\n".join(blocks)


def _paragraph(name: str, text: str) -> str:
    return textwrap.fill(
        text.strip() or "(nothing)",
        width=_WIDTH,
        initial_indent=name,
        subsequent_indent=" " * len(name),
        break_long_words=False,
    )


def _title(text: str) -> str:
    return f"\n{text}\n{'-' * len(text)}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = []
    for row in [headers, *rows]:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)
