"""An audit as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from ..records import Audit, FeatureCard
from . import _formats
from ._environment import TEMPLATES, make_environment
from ._svg import adopt_svg


def render_audit_html(audit: Audit, figures: Mapping[str, str] | None = None) -> str:
    """A self-contained page: it opens from disk, prints, and never asks the network for anything.

    Whatever an audit carries (labels, prompts, answers) is escaped, and the page's own policy lets
    a browser run no script but the page's own and load nothing.

    Args:
        audit: the evidence.
        figures: SVG documents by the name of the part of the audit that they show; see
            ``peft_fsrl.analysis.plots.draw_audit``. A part without one has its table alone.
    """
    environment = make_environment(autoescape=True, finalize=_formats.clean)
    script = (TEMPLATES / "script.js").read_text("utf-8")
    adopted = {
        name: adopt_svg(svg, f"figure-{number}", _TITLES[name])
        for number, (name, svg) in enumerate((figures or {}).items())
    }
    return environment.get_template("audit.html").render(
        audit=audit,
        style=(TEMPLATES / "style.css").read_text("utf-8"),
        script=script,
        script_hash=_script_hash(script),
        figures=adopted,
        known=_known_features(audit),
        scale_of=_formats.scale_of,
    )


_TITLES = {
    "rank_frequencies": "How often features are steered against their rank",
    "static_dynamic": "Loss with few features chosen per token, or once for all",
    "curves": "What the trainer logged over the run",
}


def _script_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _known_features(audit: Audit) -> dict[str, Any]:
    """What the page can say about features that steer generated tokens, by index."""
    shown = {
        steered.feature
        for generation in audit.generations
        for answer in generation.continuations
        for token in answer.tokens
        for steered in token.steered
    }
    uses = {use.feature: use.label for usage in audit.usages for use in usage.features}
    known = {f: label for f, label in uses.items() if label}
    known |= {
        card.use.feature: text
        for card in (*audit.promoted, *audit.suppressed)
        if (text := describe(card))
    }
    return {str(f): known[f] for f in sorted(shown) if f in known}


def describe(card: FeatureCard) -> str | None:
    """What is known of a feature, in a few words."""
    label = card.label
    if label is None:
        return card.use.label
    kinds = ", ".join(label.categories)
    return (
        f"{label.description} ({kinds})"
        if label.description and kinds
        else (label.description or kinds or card.use.label)
    )
