"""The summary of an audit as a section of a model card."""

from __future__ import annotations

import re
from typing import Any

from ..records import Audit
from ._environment import make_environment
from ._formats import clean

_SPECIAL = re.compile(r"([\\`*_\[\]|#])")


def render_card_section(audit: Audit) -> str:
    """Verdicts, scores, ablations and top features, as Markdown.

    Whatever the audit carries is escaped: it can neither open a table cell nor a comment.
    """
    environment = make_environment(autoescape=False, finalize=_escape)
    return environment.get_template("audit_section.md").render(audit=audit)


def _escape(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = " ".join(clean(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return _SPECIAL.sub(r"\\\1", text)
