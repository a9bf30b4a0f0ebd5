"""Templates, and the filters that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import _formats

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


def make_environment(**options: Any) -> Environment:
    """Jinja's, in which a name that nobody gave is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters |= {name: getattr(_formats, name) for name in _FILTERS}
    return environment
