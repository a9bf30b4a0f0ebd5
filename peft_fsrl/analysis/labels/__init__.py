"""What features mean: where labels come from, and how far to trust them."""

from ._prompts import Category, default_categories
from ._reader import pieces
from .evidence import collect_evidence, collect_held_out, is_held_out
from .files import FileLabels, load_labels, save_labels
from .judge import Judge, JudgeError, Messages
from .judging import (
    JudgeLabels,
    describe_features,
    judge_categories,
    judge_features,
    parse_verdict,
)
from .neuronpedia import NeuronpediaLabels, download_neuronpedia, load_neuronpedia
from .propagation import (
    draw_labels,
    propagate,
    propagate_ablation,
    propagate_composition,
    strata_by_use,
)
from .quality import agreement_quality, detection_quality, with_quality
from .source import (
    FixedLabels,
    LabelSource,
    OrganismLabels,
    for_model,
    organism_labels,
    require_fit,
    select,
    with_descriptions,
)
from .trust import compare_judges, compare_labels, error_rates, error_rates_for_mcc

__all__ = [
    "Category",
    "FileLabels",
    "FixedLabels",
    "Judge",
    "JudgeError",
    "JudgeLabels",
    "LabelSource",
    "Messages",
    "NeuronpediaLabels",
    "OrganismLabels",
    "agreement_quality",
    "collect_evidence",
    "collect_held_out",
    "compare_judges",
    "compare_labels",
    "default_categories",
    "describe_features",
    "detection_quality",
    "download_neuronpedia",
    "draw_labels",
    "error_rates",
    "error_rates_for_mcc",
    "for_model",
    "is_held_out",
    "judge_categories",
    "judge_features",
    "load_labels",
    "load_neuronpedia",
    "organism_labels",
    "parse_verdict",
    "pieces",
    "propagate",
    "propagate_ablation",
    "propagate_composition",
    "require_fit",
    "save_labels",
    "select",
    "strata_by_use",
    "with_descriptions",
    "with_quality",
]
