"""``FSRLConfig`` as command-line options, for scripts that parse theirs with ``TrlParser``."""

from __future__ import annotations

import typing
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any

from .config import FSRLConfig

_SCRIPT_OPTIONS = (
    "sae",
    "layer",
    "target_modules",
    "activation",
    "l1_coeff",
    "l0_coeff",
    "penalty_reduction",
    "threshold_lr_multiplier",
    "init_scale",
    "init_threshold",
    "bandwidth",
    "sae_dtype",
)


def _script_arguments() -> type:
    """One command-line option per field of ``FSRLConfig`` that a script may set."""
    hints = typing.get_type_hints(FSRLConfig)
    options: list[Any] = []
    for option in fields(FSRLConfig):
        if option.name not in _SCRIPT_OPTIONS:
            continue
        kind = str | None if option.name in ("sae", "target_modules") else hints[option.name]
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
