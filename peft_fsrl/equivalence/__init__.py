"""FSRL as LoRA restricted to an SAE's dictionary: computed, certified, exported, and read back.

docs/equivalence.md has the mathematics. ``restricted_lora`` gives the LoRA that an adapter is
around each token.
"""

from .certificates import CertificateCheck, RestrictedLoRA, certify, restricted_lora
from .converse import LinearAdapter, from_factors
from .correspondence import Correspondence, StandIn, measure_correspondence
from .encoders import NotAffineError
from .explain import ChangeShare, Explanation, FeatureShare, explain, from_lora
from .export import LoRAExport, SingleLoRA, fit_single_lora, insert_projection, to_lora
from .fidelity import Comparison, Fidelity, measure_fidelity

__all__ = [
    "CertificateCheck",
    "ChangeShare",
    "Comparison",
    "Correspondence",
    "Explanation",
    "FeatureShare",
    "Fidelity",
    "LinearAdapter",
    "LoRAExport",
    "NotAffineError",
    "RestrictedLoRA",
    "SingleLoRA",
    "StandIn",
    "certify",
    "explain",
    "fit_single_lora",
    "from_factors",
    "from_lora",
    "insert_projection",
    "measure_correspondence",
    "measure_fidelity",
    "restricted_lora",
    "to_lora",
]
