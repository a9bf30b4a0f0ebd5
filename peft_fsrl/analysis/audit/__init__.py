"""Every analysis of one adapter, with verdicts."""

from .audit import Audit, compute_audit
from .info import AdapterInfo, Setting
from .stages import AuditSettings, FeatureCard

__all__ = ["AdapterInfo", "Audit", "AuditSettings", "FeatureCard", "Setting", "compute_audit"]
