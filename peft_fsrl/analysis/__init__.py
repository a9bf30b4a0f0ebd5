"""Turn a trained adapter and a preference data set into evidence: records in, records out."""

from .ablation import ablate_categories
from .generations import compare_generations
from .preferences import check_preference_columns, score_preferences
from .records import (
    Ablation,
    FeatureUse,
    Generation,
    PreferenceScores,
    Record,
    Summary,
    Usage,
)
from .report import render_summary
from .summary import compute_summary
from .usage import compute_usage

__all__ = [
    "Ablation",
    "FeatureUse",
    "Generation",
    "PreferenceScores",
    "Record",
    "Summary",
    "Usage",
    "ablate_categories",
    "check_preference_columns",
    "compare_generations",
    "compute_summary",
    "compute_usage",
    "render_summary",
    "score_preferences",
]
