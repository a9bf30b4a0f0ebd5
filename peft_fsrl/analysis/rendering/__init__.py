"""An audit as a page: one self-contained HTML file, and a section of a model card."""

from .model_card import add_audit, render_card_section
from .page import render_audit_html

__all__ = ["add_audit", "render_audit_html", "render_card_section"]
