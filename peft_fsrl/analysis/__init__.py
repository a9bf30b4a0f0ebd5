"""Turn a trained adapter and a preference data set into evidence: records in, records out."""

from ..training.coherence import (
    compare_coherence,
    compute_coherence,
)
from .ablation import (
    ablate_categories,
)
from .buckets import (
    compute_gain,
    score_by_length,
)
from .composition import (
    FeatureCounts,
    composition_of,
    compute_compositions,
    count_features,
)
from .curves import (
    load_training_curves,
)
from .generations import (
    compare_generations,
)
from .preferences import (
    score_preferences,
)
from .ranking import (
    rank_layers,
)
from .records import (
    Ablation,
    AdapterDifference,
    AdapterInfo,
    Agreement,
    Audit,
    CategoryShare,
    Checkup,
    Coherence,
    Composition,
    Context,
    Continuation,
    Curve,
    FeatureAblation,
    FeatureAblations,
    FeatureCard,
    FeatureDifference,
    FeatureEffect,
    FeatureEvidence,
    FeatureLabel,
    FeatureUse,
    Finding,
    Generation,
    Interval,
    Labels,
    LayerEffect,
    LengthBucket,
    PreferenceScores,
    RankFrequency,
    Record,
    Robustness,
    SAEFit,
    Setting,
    StaticDynamic,
    SteeredFeature,
    SteeredToken,
    SteeringLevel,
    StratumEffect,
    Summary,
    SweepPoint,
    TrainingCurves,
    Usage,
    VariantCoherence,
    WinRate,
)
from .report import (
    render_coherence,
    render_generations,
    render_steered_tokens,
    render_summary,
    render_variants,
)
from .session import (
    Session,
)
from .single import (
    ablate_single_features,
)
from .static_dynamic import (
    compare_static_dynamic,
)
from .summary import (
    compute_summary,
)
from .sweeps import (
    by_penalty,
    load_sweep,
    save_sweep,
)
from .usage import (
    compute_rank_frequency,
    compute_usage,
    compute_usages,
)
from .winrate import (
    AnswerPair,
    compute_win_rate,
    sample_pairs,
)

__all__ = [
    "Ablation",
    "AdapterDifference",
    "AdapterInfo",
    "Agreement",
    "AnswerPair",
    "Audit",
    "CategoryShare",
    "Checkup",
    "Coherence",
    "Composition",
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
    "Generation",
    "Interval",
    "Labels",
    "LayerEffect",
    "LengthBucket",
    "PreferenceScores",
    "RankFrequency",
    "Record",
    "Robustness",
    "SAEFit",
    "Session",
    "Setting",
    "StaticDynamic",
    "SteeredFeature",
    "SteeredToken",
    "SteeringLevel",
    "StratumEffect",
    "Summary",
    "SweepPoint",
    "TrainingCurves",
    "Usage",
    "VariantCoherence",
    "WinRate",
    "ablate_categories",
    "ablate_single_features",
    "by_penalty",
    "compare_coherence",
    "compare_generations",
    "compare_static_dynamic",
    "composition_of",
    "compute_coherence",
    "compute_compositions",
    "compute_gain",
    "compute_rank_frequency",
    "compute_summary",
    "compute_usage",
    "compute_usages",
    "compute_win_rate",
    "count_features",
    "load_sweep",
    "load_training_curves",
    "rank_layers",
    "render_coherence",
    "render_generations",
    "render_steered_tokens",
    "render_summary",
    "render_variants",
    "sample_pairs",
    "save_sweep",
    "score_by_length",
    "score_preferences",
]
