"""Audits, checkups and differences as plain text. Reads records and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from .layout import paragraph, table, title
from .records import AdapterDifference, Audit, Checkup, FeatureDifference, FeatureUse, Finding
from .report import render_ablations, render_scores, render_usage


def render_audit(audit: Audit, n_features: int = 8) -> str:
    """The verdict of an audit and the figures behind it, for a terminal.

    Args:
        audit: the evidence; the page has all of it.
        n_features: how many of the most steered features to list.
    """
    info = audit.info
    place = f" at {info.hook_name}" if info.hook_name else ""
    lines = [
        paragraph(
            "",
            f"{info.adapter}: {info.n_parameters:,} trained parameters{place} of "
            f"{info.base_model or 'its base model'}, on {audit.n_pairs:,} held-out pairs of "
            f"{audit.dataset}.",
        ),
        "",
        render_findings(audit.findings),
    ]
    if audit.usages:
        usage = audit.usages[0]
        lines += [
            title(f"Held-out preference pairs ({audit.n_pairs})"),
            render_scores(audit.base, audit.trained, usage),
            title("Most steered features (answer tokens)"),
            render_usage(usage, n_features),
        ]
    if audit.ablations:
        lines += [
            title("With the steering of some features zeroed"),
            render_ablations(audit.base, audit.trained, audit.ablations),
        ]
    return "\n".join(lines) + "\n"


def render_checkup(checkup: Checkup) -> str:
    """The figures of a checkup, the place that was asked about first, and what they say."""
    rows = [
        [
            ("> " if fit.intended else "  ") + fit.hook,
            fit.model,
            f"{fit.fvu:.1%}",
            f"{fit.l0:.1f}",
            f"{fit.dead:.1%}",
            f"{fit.n_tokens:,}",
        ]
        for fit in checkup.fits
    ]
    headers = ["  place", "model", "unexplained", "active per token", "never active", "tokens"]
    heading = f"The SAE {checkup.sae} on {checkup.dataset}"
    return f"{heading}\n\n{table(headers, rows)}\n\n{render_findings(checkup.findings)}\n"


def render_difference(difference: AdapterDifference, n_features: int = 30) -> str:
    """Two adapters beside each other, the features first on which they differ most.

    Args:
        difference: from ``compute_difference``.
        n_features: how many features to list.
    """
    known = difference.correlation
    lines = [
        f"A  {difference.first}: {difference.first_l0:.2f} features per token",
        f"B  {difference.second}: {difference.second_l0:.2f} features per token",
        "",
        paragraph(
            "",
            f"Over {difference.n_tokens:,} answer tokens of {difference.dataset}. Both steer "
            f"{difference.overlap:.0%} of the features that either does; rank correlation of their "
            "mean v " + ("unknown." if known is None else f"{known:+.2f}."),
        ),
        "",
        table(
            ["feature", "detects", "mean v, A", "B", "difference", "tokens, A", "B", "cosine"],
            [_row(each) for each in difference.features[:n_features]],
        ),
    ]
    return "\n".join(lines) + "\n"


def render_findings(findings: Sequence[Finding]) -> str:
    """Verdict, question and answer, one under another."""
    blocks = [
        f"{finding.verdict:<8}{finding.question}\n{paragraph(' ' * 8, finding.answer)}"
        for finding in findings
    ]
    return "\n\n".join(blocks)


def _row(each: FeatureDifference) -> list[str]:
    means = [use.mean_steering if use else 0.0 for use in (each.first, each.second)]
    return [
        str(each.feature),
        (each.label or "-")[:24],
        f"{means[0]:+.4f}",
        f"{means[1]:+.4f}",
        f"{means[1] - means[0]:+.4f}",
        _frequency(each.first),
        _frequency(each.second),
        "-" if each.cosine is None else f"{each.cosine:+.2f}",
    ]


def _frequency(use: FeatureUse | None) -> str:
    return f"{use.frequency:.1%}" if use else "-"
