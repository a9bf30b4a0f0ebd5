"""Turn a trained adapter and a preference data set into evidence: records in, records out."""

from .ablation import ablate_categories
from .coherence import compare_coherence, compute_coherence
from .generations import compare_generations
from .preferences import score_preferences
from .ranking import rank_layers
from .records import (
    Ablation,
    Coherence,
    Continuation,
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
    VariantCoherence,
)
from .report import (
    render_coherence,
    render_generations,
    render_steered_tokens,
    render_summary,
)
from .summary import compute_summary
from .sweeps import load_sweep, save_sweep
from .usage import compute_usage

__all__ = [
    "Ablation",
    "Coherence",
    "Continuation",
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
    "VariantCoherence",
    "ablate_categories",
    "compare_coherence",
    "compare_generations",
    "compute_coherence",
    "compute_summary",
    "compute_usage",
    "load_sweep",
    "rank_layers",
    "render_coherence",
    "render_generations",
    "render_steered_tokens",
    "render_summary",
    "save_sweep",
    "score_preferences",
]
