"""Everything about one adapter: every analysis, made once, with a verdict."""

from .audit import compute_audit
from .settings import AuditSettings

__all__ = ["AuditSettings", "compute_audit"]
