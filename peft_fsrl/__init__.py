"""Feature steering adapters for language models: alignment that can be read feature by feature.

Importing the package registers the method with PEFT, so that ``get_peft_model`` and
``PeftModel.from_pretrained`` know it.
"""

from ._identity import SAEInfo
from ._registration import register
from .config import FSRLConfig
from .layer import FSRLLayer
from .model import FSRLModel
from .pruning import PruningReport, prune
from .sae import FrozenSAE
from .sae_sources import freeze_sae, load_sae

__version__ = "0.1.0"

__all__ = [
    "FSRLConfig",
    "FSRLLayer",
    "FSRLModel",
    "FrozenSAE",
    "PruningReport",
    "SAEInfo",
    "__version__",
    "freeze_sae",
    "load_sae",
    "prune",
]

register()
