"""A figure's SVG inside a page: its colours follow the page's, its ids do not clash."""

from __future__ import annotations

import re

# What the plots draw with, and what stands for it in the page's style sheet.
_COLOURS = {
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
    return _COLOURS.get(match[0].lower(), match[0])
