"""Evidence as plain records: frozen dataclasses that survive a round trip through JSON."""

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
from .base import Interval, Record
from .benchmarks import Evaluation, PreferenceComparison, TaskFigure, TaskScores
from .effects import (
    Ablation,
    FeatureAblation,
    FeatureAblations,
    StaticDynamic,
    SteeringLevel,
    StratumEffect,
)
from .equivalence import Correspondence, StandIn
from .labels import Agreement, Context, FeatureEvidence, FeatureLabel, Labels, Robustness
from .preferences import LengthBucket, PreferenceScores, WinRate
from .texts import (
    Coherence,
    Continuation,
    Generation,
    SteeredFeature,
    SteeredToken,
    VariantCoherence,
)
from .training import Curve, FeatureEffect, LayerEffect, SweepPoint, TrainingCurves
from .use import CategoryShare, Composition, FeatureUse, RankFrequency, Usage

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
    "Correspondence",
    "Curve",
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
    "Interval",
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
    "StandIn",
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
]
