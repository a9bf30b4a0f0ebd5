"""The summary of an audit in the model card of the adapter."""

from __future__ import annotations

from pathlib import Path

from peft.utils import CONFIG_NAME

from ...files import write_text_atomically
from ...training.card import CARD, put_section, weights_digest
from ..records import Audit
from ..rendering import render_card_section


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
