"""``FSRLConfig`` as command-line options, for scripts that parse theirs with ``TrlParser``."""

from __future__ import annotations

import typing
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any

from ..tuner.config import FSRLConfig

_SCRIPT_OPTIONS = (
    "sae",
    "layer",
    "target_modules",
    "features",
    "exclude_features",
    "rank",
    "activation",
    "non_negative",
    "l1_coeff",
    "l2_coeff",
    "l0_coeff",
    "penalty_reduction",
    "penalty_warmup_ratio",
    "target_l0",
    "threshold_lr_multiplier",
    "init_weights",
    "init_scale",
    "init_threshold",
    "min_gain",
    "jumprelu_bandwidth",
    "sae_dtype",
)

# Where a field takes more than one word on a command line can say.
_KINDS: dict[str, Any] = {
    "sae": str | None,
    "layer": int | None,
    "target_modules": str | None,
    "features": list[int] | None,
    "exclude_features": list[int] | None,
}


def _script_arguments() -> type:
    """One command-line option per field of ``FSRLConfig`` that a script may set."""
    hints = typing.get_type_hints(FSRLConfig)
    options: list[Any] = []
    for option in fields(FSRLConfig):
        if option.name not in _SCRIPT_OPTIONS:
            continue
        kind = _KINDS.get(option.name, hints[option.name])
        assert option.default is not MISSING
        copied = field(default=option.default, metadata=dict(option.metadata))
        options.append((option.name, kind, copied))

    def to_config(self: Any) -> FSRLConfig:
        chosen = {name: getattr(self, name) for name, _, _ in options}
        return FSRLConfig(task_type="CAUSAL_LM", **chosen)

    namespace = {
        "__doc__": "Options of an FSRL adapter for TrlParser; see ``FSRLConfig``.",
        "to_config": to_config,
    }
    return make_dataclass("FSRLArguments", options, namespace=namespace)


FSRLArguments = _script_arguments()
