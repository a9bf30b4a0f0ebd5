"""The lens on preference data: what they prefer, before training, and whether an adapter does."""

from .contrast import (
    ENOUGH_PAIRS,
    CategoryContrast,
    DataContrast,
    FeatureContrast,
    FeatureExamples,
    compute_contrast,
)
from .curation import DROP, RELABEL, Curation, apply_curation, compute_curation
from .mirror import Mirror, MirroredFeature, compute_mirror

__all__ = [
    "DROP",
    "ENOUGH_PAIRS",
    "RELABEL",
    "CategoryContrast",
    "Curation",
    "DataContrast",
    "FeatureContrast",
    "FeatureExamples",
    "Mirror",
    "MirroredFeature",
    "apply_curation",
    "compute_contrast",
    "compute_curation",
    "compute_mirror",
]
