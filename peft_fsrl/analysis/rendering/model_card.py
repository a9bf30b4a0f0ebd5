"""The summary of an audit in the model card of the adapter, as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ...files import write_text_atomically
from ...training.card import CARD, put_section, weights_digest
from ..audit.audit import Audit
from .formats import clean
from .page import make_environment

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


def add_audit(folder: str | Path, audit: Audit) -> None:
    """Put an audit's summary into the ``README.md`` of an adapter's folder, or replace it there.

    Saving the adapter again keeps the summary while the weights stay the same, and drops it once
    they change.

    Args:
        folder: of the adapter that was audited.
        audit: the evidence.

    Raises:
        ValueError: if the folder holds no adapter.
    """
    folder = Path(folder)
    weights = weights_digest(folder)
    if weights is None or not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"Expected an adapter's folder ({CONFIG_NAME} and its weights), found none in "
            f"{folder}. Save the adapter first."
        )
    path = folder / CARD
    card = path.read_text("utf-8") if path.is_file() else f"# {folder.resolve().name}\n"
    write_text_atomically(path, put_section(card, render_card_section(audit), weights))
