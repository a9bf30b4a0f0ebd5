"""FSRL as LoRA restricted to an SAE's dictionary: computed, certified, exported, and read back.

docs/equivalence.md has the mathematics. ``restricted_lora`` gives the LoRA that an adapter is
around each token.
"""

from .certificates import CertificateCheck, RestrictedLoRA, certify, restricted_lora
from .converse import LinearAdapter, from_factors
from .encoders import NotAffineError
from .explain import explain, from_lora
from .explanation import Explanation, FeatureShare, Share
from .export import LoRAExport, SingleLoRA, fit_single_lora, stand_ins, to_lora
from .measure import Comparison, Fidelity, compare
from .sites import insert_projection

__all__ = [
    "CertificateCheck",
    "Comparison",
    "Explanation",
    "FeatureShare",
    "Fidelity",
    "LinearAdapter",
    "LoRAExport",
    "NotAffineError",
    "RestrictedLoRA",
    "Share",
    "SingleLoRA",
    "certify",
    "compare",
    "explain",
    "fit_single_lora",
    "from_factors",
    "from_lora",
    "insert_projection",
    "restricted_lora",
    "stand_ins",
    "to_lora",
]
