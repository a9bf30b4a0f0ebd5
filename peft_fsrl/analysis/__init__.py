"""Turn a trained adapter and a preference data set into evidence: records in, records out."""

from ..records import Interval, Record
from ..training.coherence import (
    Coherence,
    VariantCoherence,
    compare_coherence,
    compute_coherence,
)
from .ablation import Ablation, StratumEffect, measure_categories
from .audit import AdapterInfo, Audit, AuditSettings, FeatureCard, Setting, compute_audit
from .buckets import LengthBucket, compute_gain, score_by_length
from .checkup import Checkup, SAEFit, compute_checkup
from .choices import choice_rows
from .composition import (
    CategoryShare,
    Composition,
    FeatureCounts,
    Firing,
    composition_of,
    compute_compositions,
    count_features,
    measure_firing,
)
from .concentration import (
    CategoryMass,
    Concentration,
    Magnitudes,
    TopFeatures,
    compute_concentration,
    measure_magnitudes,
)
from .curves import Curve, TrainingCurves, load_training_curves
from .diff import AdapterDifference, FeatureDifference, compute_difference
from .divergence import compute_divergence
from .findings import Finding
from .generations import (
    Continuation,
    Generation,
    SteeredFeature,
    SteeredToken,
    compare_generations,
)
from .inspection import (
    Inspection,
    InspectionSettings,
    Listening,
    LoudInput,
    SteerableFeature,
    Trigger,
    compute_inspection,
)
from .labels import Agreement, Context, FeatureEvidence, FeatureLabel, Labels, Robustness
from .preferences import PreferenceScores, score_preferences
from .ranking import FeatureEffect, LayerEffect, LayerProbe, probe_layers, rank_layers
from .report import (
    render_coherence,
    render_concentration,
    render_firing,
    render_generations,
    render_inspection,
    render_magnitudes,
    render_steered_tokens,
    render_summary,
    render_variants,
)
from .session import Session
from .single import FeatureAblation, FeatureAblations, measure_features
from .static_dynamic import StaticDynamic, SteeringLevel, compare_static_dynamic
from .summary import Summary, compute_summary
from .sweeps import SweepPoint, by_penalty, load_sweep, save_sweep
from .usage import (
    FeatureUse,
    RankFrequency,
    Usage,
    compute_rank_frequency,
    compute_usage,
    compute_usages,
)
from .winrate import AnswerPair, WinRate, compute_win_rate, sample_pairs

__all__ = [
    "Ablation",
    "AdapterDifference",
    "AdapterInfo",
    "Agreement",
    "AnswerPair",
    "Audit",
    "AuditSettings",
    "CategoryMass",
    "CategoryShare",
    "Checkup",
    "Coherence",
    "Composition",
    "Concentration",
    "Context",
    "Continuation",
    "Curve",
    "FeatureAblation",
    "FeatureAblations",
    "FeatureCard",
    "FeatureCounts",
    "FeatureDifference",
    "FeatureEffect",
    "FeatureEvidence",
    "FeatureLabel",
    "FeatureUse",
    "Finding",
    "Firing",
    "Generation",
    "Inspection",
    "InspectionSettings",
    "Interval",
    "Labels",
    "LayerEffect",
    "LayerProbe",
    "LengthBucket",
    "Listening",
    "LoudInput",
    "Magnitudes",
    "PreferenceScores",
    "RankFrequency",
    "Record",
    "Robustness",
    "SAEFit",
    "Session",
    "Setting",
    "StaticDynamic",
    "SteerableFeature",
    "SteeredFeature",
    "SteeredToken",
    "SteeringLevel",
    "StratumEffect",
    "Summary",
    "SweepPoint",
    "TopFeatures",
    "TrainingCurves",
    "Trigger",
    "Usage",
    "VariantCoherence",
    "WinRate",
    "by_penalty",
    "choice_rows",
    "compare_coherence",
    "compare_generations",
    "compare_static_dynamic",
    "composition_of",
    "compute_audit",
    "compute_checkup",
    "compute_coherence",
    "compute_compositions",
    "compute_concentration",
    "compute_difference",
    "compute_divergence",
    "compute_gain",
    "compute_inspection",
    "compute_rank_frequency",
    "compute_summary",
    "compute_usage",
    "compute_usages",
    "compute_win_rate",
    "count_features",
    "load_sweep",
    "load_training_curves",
    "measure_categories",
    "measure_features",
    "measure_firing",
    "measure_magnitudes",
    "probe_layers",
    "rank_layers",
    "render_coherence",
    "render_concentration",
    "render_firing",
    "render_generations",
    "render_inspection",
    "render_magnitudes",
    "render_steered_tokens",
    "render_summary",
    "render_variants",
    "sample_pairs",
    "save_sweep",
    "score_by_length",
    "score_preferences",
]
