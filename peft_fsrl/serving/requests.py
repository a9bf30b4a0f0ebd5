"""Per-request options of steering: adapter, strength, ablated features, phase.

Requests say so in ``SamplingParams.extra_args``, which is ``vllm_xargs`` in the OpenAI API.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..training.rollouts import KEY

PREFIX = "fsrl_"
PHASES = ("all", "prompt", "generation")
MOST_FEATURES = 20
_KEYS = ("adapter", "strength", "ablate", "phase", "features")


@dataclass(frozen=True)
class Served:
    """What a server has loaded, as plain JSON values.

    Attributes:
        adapters: folder or Hub repository of each adapter by its name; the first is the default.
        n_features: by adapter, how many features its SAE has (the smallest, of several).
        places: by adapter, the steered modules as transformers calls them.
        labels: file of labels of the default adapter's SAE, or None.
        categories: features by category, from that file.
        labeled: the adapters that steer features of that SAE, for which categories mean something.
    """

    adapters: dict[str, str]
    n_features: dict[str, int]
    places: dict[str, list[str]]
    labels: str | None = None
    categories: dict[str, list[int]] = field(default_factory=dict)
    labeled: list[str] = field(default_factory=list)

    @property
    def default(self) -> str:
        """The adapter of requests that name none."""
        return next(iter(self.adapters))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as they travel in vLLM's config."""
        return asdict(self)


@dataclass(frozen=True)
class SteeringRequest:
    """How one request is steered.

    Attributes:
        adapter: its name.
        strength: factor of every steering vector; 0 is the base model.
        ablated: features whose steering is zeroed, ascending.
        phase: ``"all"`` tokens, those of the ``"prompt"``, or those that are generated
            (``"generation"``). A token's steering acts on the tokens that come after it.
        features: how many of the strongest features of each token to report.
    """

    adapter: str
    strength: float = 1.0
    ablated: tuple[int, ...] = ()
    phase: str = "all"
    features: int = 0

    def cache_salt(self, default: str, salt: str | None) -> str | None:
        """What a prefix cache must tell apart: prompts that are steered differently.

        Args:
            default: the adapter whose plain steering needs no mark.
            salt: the request's own, kept.
        """
        if self.strength == 0:
            key: list[Any] = ["base"]
        elif self == SteeringRequest(default, features=self.features):
            return salt
        else:
            key = [self.adapter, self.strength, self.ablated, self.phase]
        return f"{KEY}:{json.dumps(key)}:{salt or ''}"


def parse_request(extra_args: Mapping[str, Any] | None, served: Served) -> SteeringRequest:
    """Read what a request asks for.

    Args:
        extra_args: of the request. ``fsrl_adapter``, ``fsrl_strength``, ``fsrl_ablate`` (indices,
            or names of categories where labels are loaded, as a list or with commas between),
            ``fsrl_phase`` and ``fsrl_features``; other keys are not ours.
        served: what is loaded.

    Raises:
        ValueError: for a value that means nothing here, with what would.
    """
    given = {k.removeprefix(PREFIX): v for k, v in (extra_args or {}).items() if _is_ours(k)}
    if unknown := sorted(set(given) - set(_KEYS)):
        known = ", ".join(PREFIX + key for key in _KEYS)
        raise ValueError(f"Unknown option {PREFIX}{unknown[0]}: expected one of {known}.")
    adapter = given.get("adapter", served.default)
    if adapter not in list(served.adapters):
        raise ValueError(
            f"fsrl_adapter names {adapter!r}, which is not loaded: expected one of "
            f"{sorted(served.adapters)}."
        )
    phase = given.get("phase", "all")
    if phase not in PHASES:
        raise ValueError(f"fsrl_phase must be one of {PHASES}, got {phase!r}.")
    return SteeringRequest(
        adapter,
        _strength(given.get("strength", 1.0)),
        _ablated(given.get("ablate", ()), served, adapter),
        phase,
        _count(given.get("features", 0)),
    )


def _is_ours(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(PREFIX)


def _number(value: Any) -> float:
    """As a float; nan for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _strength(value: Any) -> float:
    strength = _number(value)
    if not math.isfinite(strength):
        raise ValueError(f"fsrl_strength must be a finite number (0 is the base), got {value!r}.")
    return strength


def _count(value: Any) -> int:
    count = _number(value)
    if not (0 <= count <= MOST_FEATURES and count.is_integer()):
        raise ValueError(
            f"fsrl_features must be a whole number from 0 to {MOST_FEATURES}, got {value!r}."
        )
    return int(count)


def _ablated(value: Any, served: Served, adapter: str) -> tuple[int, ...]:
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, Sequence):
        words = [words]
    chosen: set[int] = set()
    n_features = served.n_features[adapter]
    categories = served.categories if adapter in served.labeled else {}
    for word in words:
        if isinstance(word, str) and word.strip() in categories:
            chosen.update(categories[word.strip()])
            continue
        try:
            feature = None if isinstance(word, bool) else int(word)
        except (TypeError, ValueError, OverflowError):
            feature = None
        if feature is None or feature != float(word):
            known = f" or a category among {sorted(categories)}" if categories else ""
            raise ValueError(f"fsrl_ablate expects feature indices{known}, got {word!r}.")
        if not 0 <= feature < n_features:
            raise ValueError(
                f"fsrl_ablate names feature {feature}, but the SAE of adapter {adapter!r} has "
                f"features 0 to {n_features - 1}."
            )
        chosen.add(feature)
    return tuple(sorted(chosen))
