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
    WinRate,
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
from .winrate import AnswerPair, compute_win_rate, sample_pairs

__all__ = [
    "Ablation",
    "AnswerPair",
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
    "WinRate",
    "ablate_categories",
    "compare_coherence",
    "compare_generations",
    "compute_coherence",
    "compute_summary",
    "compute_usage",
    "compute_win_rate",
    "load_sweep",
    "rank_layers",
    "render_coherence",
    "render_generations",
    "render_steered_tokens",
    "render_summary",
    "sample_pairs",
    "save_sweep",
    "score_preferences",
]
