"""Evidence as plain records: frozen dataclasses that survive a round trip through JSON."""

from ...records import Interval, Record, from_plain, to_plain
from ...training.coherence import Coherence, VariantCoherence
from .benchmarks import Evaluation, PreferenceComparison, TaskFigure, TaskScores
from .effects import (
    Ablation,
    FeatureAblation,
    FeatureAblations,
    StaticDynamic,
    SteeringLevel,
    StratumEffect,
)
from .preferences import LengthBucket, PreferenceScores, WinRate
from .texts import (
    Continuation,
    Generation,
    SteeredFeature,
    SteeredToken,
)
from .training import Curve, FeatureEffect, LayerEffect, SweepPoint, TrainingCurves
from .use import CategoryShare, Composition, FeatureUse, RankFrequency, Usage

# isort: split
# These import the records above.
from ..labels import (
    Agreement,
    Context,
    Detection,
    ErrorRates,
    FeatureEvidence,
    FeatureLabel,
    HeldOutContexts,
    Judgement,
    Labels,
    Robustness,
    Spend,
)
from .audit import (
    AdapterDifference,
    AdapterInfo,
    Audit,
    Checkup,
    FeatureCard,
    FeatureDifference,
    Finding,
    SAEFit,
    Setting,
    Summary,
)

__all__ = [
    "Ablation",
    "AdapterDifference",
    "AdapterInfo",
    "Agreement",
    "Audit",
    "CategoryShare",
    "Checkup",
    "Coherence",
    "Composition",
    "Context",
    "Continuation",
    "Curve",
    "Detection",
    "ErrorRates",
    "Evaluation",
    "FeatureAblation",
    "FeatureAblations",
    "FeatureCard",
    "FeatureDifference",
    "FeatureEffect",
    "FeatureEvidence",
    "FeatureLabel",
    "FeatureUse",
    "Finding",
    "Generation",
    "HeldOutContexts",
    "Interval",
    "Judgement",
    "Labels",
    "LayerEffect",
    "LengthBucket",
    "PreferenceComparison",
    "PreferenceScores",
    "RankFrequency",
    "Record",
    "Robustness",
    "SAEFit",
    "Setting",
    "Spend",
    "StaticDynamic",
    "SteeredFeature",
    "SteeredToken",
    "SteeringLevel",
    "StratumEffect",
    "Summary",
    "SweepPoint",
    "TaskFigure",
    "TaskScores",
    "TrainingCurves",
    "Usage",
    "VariantCoherence",
    "WinRate",
    "from_plain",
    "to_plain",
]
