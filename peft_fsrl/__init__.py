"""Feature steering adapters for language models: alignment that can be read feature by feature.

Importing the package registers the method with PEFT, so that ``get_peft_model`` and
``PeftModel.from_pretrained`` know it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .sae.frozen import FrozenSAE, SAEInfo
from .sae.loading import freeze_sae, load_sae
from .steering import (
    SteeringEvent,
    TokenStatistics,
    ablate_features,
    edit_steering,
    observe,
    only_features,
    scale_steering,
    top_k_steering,
)
from .tuner.config import FSRLConfig
from .tuner.layer import FSRLLayer
from .tuner.model import FSRLModel
from .tuner.registration import register

if TYPE_CHECKING:
    from .analysis.pruning import PruningReport, prune
    from .training.trainer import with_fsrl

__version__ = "0.1.0"

__all__ = [
    "FSRLConfig",
    "FSRLLayer",
    "FSRLModel",
    "FrozenSAE",
    "PruningReport",
    "SAEInfo",
    "SteeringEvent",
    "TokenStatistics",
    "__version__",
    "ablate_features",
    "edit_steering",
    "freeze_sae",
    "load_sae",
    "observe",
    "only_features",
    "prune",
    "scale_steering",
    "top_k_steering",
    "with_fsrl",
]

# What imports a trainer or an analysis is imported when it is first asked for.
_LAZY = {
    "PruningReport": ".analysis.pruning",
    "prune": ".analysis.pruning",
    "with_fsrl": ".training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


register()
