"""Turn a trained adapter and a preference data set into evidence: records in, records out."""

from .ablation import ablate_categories
from .coherence import compute_coherence
from .generations import compare_generations
from .preferences import score_preferences
from .ranking import rank_layers
from .records import (
    Ablation,
    Coherence,
    Correspondence,
    FeatureEffect,
    FeatureUse,
    Generation,
    LayerEffect,
    PreferenceScores,
    Record,
    StandIn,
    Summary,
    SweepPoint,
    Usage,
)
from .report import render_summary
from .summary import compute_summary
from .sweeps import load_sweep, save_sweep
from .usage import compute_usage

__all__ = [
    "Ablation",
    "Coherence",
    "Correspondence",
    "FeatureEffect",
    "FeatureUse",
    "Generation",
    "LayerEffect",
    "PreferenceScores",
    "Record",
    "StandIn",
    "Summary",
    "SweepPoint",
    "Usage",
    "ablate_categories",
    "compare_generations",
    "compute_coherence",
    "compute_summary",
    "compute_usage",
    "load_sweep",
    "rank_layers",
    "render_summary",
    "save_sweep",
    "score_preferences",
]
