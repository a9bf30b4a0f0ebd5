"""Training with a sparsity penalty: trainer, data, objectives, coherence.

What imports trainers or TRL is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import FSRLArguments
    from .card import render_model_card
    from .checkpoints import complete_checkpoints, find_checkpoint
    from .coherence import (
        Coherence,
        CoherenceCallback,
        VariantCoherence,
        compare_coherence,
        compute_coherence,
    )
    from .data import PreferenceReport, pair_texts, prepare_preferences, prompt_texts
    from .metrics import NonfiniteReport
    from .muon import MuonAdamW
    from .objectives import simpo_loss
    from .penalty import SparsityPenalty
    from .prefix import without_prefix_graph
    from .simpo import SimPOConfig, SimPOTrainer, StableSimPOConfig, StableSimPOTrainer
    from .thresholds import bound_gains
    from .trainer import FSRLTrainerMixin, with_fsrl

__all__ = [
    "Coherence",
    "CoherenceCallback",
    "FSRLArguments",
    "FSRLTrainerMixin",
    "MuonAdamW",
    "NonfiniteReport",
    "PreferenceReport",
    "SimPOConfig",
    "SimPOTrainer",
    "SparsityPenalty",
    "StableSimPOConfig",
    "StableSimPOTrainer",
    "VariantCoherence",
    "bound_gains",
    "compare_coherence",
    "complete_checkpoints",
    "compute_coherence",
    "find_checkpoint",
    "pair_texts",
    "prepare_preferences",
    "prompt_texts",
    "render_model_card",
    "simpo_loss",
    "with_fsrl",
    "without_prefix_graph",
]

_HOMES = {
    "arguments": ("FSRLArguments",),
    "card": ("render_model_card",),
    "checkpoints": ("complete_checkpoints", "find_checkpoint"),
    "coherence": (
        "Coherence",
        "CoherenceCallback",
        "VariantCoherence",
        "compare_coherence",
        "compute_coherence",
    ),
    "data": ("PreferenceReport", "pair_texts", "prepare_preferences", "prompt_texts"),
    "metrics": ("NonfiniteReport",),
    "muon": ("MuonAdamW",),
    "objectives": ("simpo_loss",),
    "penalty": ("SparsityPenalty",),
    "prefix": ("without_prefix_graph",),
    "simpo": ("SimPOConfig", "SimPOTrainer", "StableSimPOConfig", "StableSimPOTrainer"),
    "thresholds": ("bound_gains",),
    "trainer": ("FSRLTrainerMixin", "with_fsrl"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
