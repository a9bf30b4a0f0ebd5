"""Records as pages: one self-contained HTML file, and a section of a model card."""

from .card import render_card_section
from .html import render_audit_html

__all__ = ["render_audit_html", "render_card_section"]
