"""An audit as one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..audit import Audit, FeatureCard
from . import formats

TEMPLATES = Path(__file__).parent / "templates"
_FILTERS = (
    "fixed",
    "signed",
    "signed_seen",
    "short",
    "percent",
    "between",
    "thousands",
    "shades",
    "safe_url",
)
_TITLES = {
    "rank_frequencies": "How often features are steered against their rank",
    "static_dynamic": "Loss with few features chosen per token, or once for all",
    "curves": "What the trainer logged over the run",
}
# What the plots draw with, and what stands for it in the page's style sheet.
_COLORS = {
    "#000000": "currentColor",
    "black": "currentColor",
    "#ffffff": "var(--surface)",
    "#b8b8b8": "var(--faint)",
    "#cccccc": "var(--rule)",
    "#808080": "var(--muted)",
    "#c2571a": "var(--series-1)",
    "#2a6f97": "var(--series-2)",
    "#4f772d": "var(--series-3)",
    "#7b2d8b": "var(--series-4)",
}
_STYLE = re.compile(r'((?:style|fill|stroke)=")([^"]*)(")')
_COLOUR = re.compile(r"#[0-9a-f]{6}\b|\bblack\b", re.IGNORECASE)


def render_audit_html(audit: Audit, figures: Mapping[str, str] | None = None) -> str:
    """A self-contained page: it opens from disk, prints, and makes no request.

    Whatever an audit carries (labels, prompts, answers) is escaped, and the page's own policy lets
    a browser run no script but the page's own and load nothing.

    Args:
        audit: the evidence.
        figures: SVG documents by the name of the part of the audit that they show; see
            ``peft_fsrl.analysis.plots.draw_audit``. A part without one has its table alone.
    """
    environment = make_environment(autoescape=True, finalize=formats.clean)
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
        scale_of=formats.scale_of,
    )


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
    return {str(f): formats.clean(known[f]) for f in sorted(shown) if f in known}


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


def make_environment(**options: Any) -> Environment:
    """Jinja's, in which a name that nobody gave is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters |= {name: getattr(formats, name) for name in _FILTERS}
    return environment


def adopt_svg(svg: str, prefix: str, title: str) -> str:
    """An SVG document as an element of a page.

    Args:
        svg: the document, as matplotlib writes it.
        prefix: put before every id; another one for each figure of a page.
        title: what a screen reader says; plain letters, digits and punctuation.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = body.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    body = _STYLE.sub(lambda m: m[1] + _COLOUR.sub(_themed, m[2]) + m[3], body)
    head, rest = body.split(">", 1)
    head = re.sub(r' (?:width|height|xmlns:xlink|version)="[^"]*"', "", head)
    head = head.replace("<svg", f'<svg class="plot" role="img" aria-label="{title}"', 1)
    return f"{head}>{rest}".replace("xlink:href", "href")


def _themed(match: re.Match[str]) -> str:
    return _COLORS.get(match[0].lower(), match[0])
