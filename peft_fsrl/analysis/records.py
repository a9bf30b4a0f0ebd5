"""Evidence as plain records: frozen dataclasses that survive a round trip through JSON."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar

RecordT = TypeVar("RecordT", bound="Record")


@dataclass(frozen=True)
class Record:
    """Base of all records."""

    def to_json(self) -> str:
        """The record as indented JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls: type[RecordT], text: str) -> RecordT:
        """The record that ``to_json`` wrote.

        Raises:
            ValueError: if the text is not JSON, or lacks a field of the record, or has another.
        """
        return typing.cast(RecordT, _build(cls, json.loads(text)))


@dataclass(frozen=True)
class PreferenceScores(Record):
    """How a model ranks preference pairs under SimPO's length-normalised reward.

    Attributes:
        losses: SimPO loss of each pair, without any penalty.
        margins: ``beta * (mean log p(chosen) - mean log p(rejected))`` of each pair.
    """

    losses: tuple[float, ...]
    margins: tuple[float, ...]

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """Mean SimPO loss."""
        return sum(self.losses) / len(self.losses)

    @property
    def accuracy(self) -> float:
        """Share of pairs in which the chosen answer has the larger reward."""
        return sum(margin > 0 for margin in self.margins) / len(self.margins)

    @property
    def margin(self) -> float:
        """Mean reward margin."""
        return sum(self.margins) / len(self.margins)


@dataclass(frozen=True)
class FeatureUse(Record):
    """How an adapter uses one feature, over real tokens.

    Attributes:
        feature: index in the SAE.
        frequency: share of tokens on which it is steered.
        mean_steering: mean of ``v`` over all tokens, in units of feature activation.
        mean_abs_steering: mean of ``|v|`` over all tokens.
        label: what the feature detects, if known.
    """

    feature: int
    frequency: float
    mean_steering: float
    mean_abs_steering: float
    label: str | None = None


@dataclass(frozen=True)
class Usage(Record):
    """An adapter's use of all features that it ever steers, most steering mass first.

    Attributes:
        n_tokens: real tokens counted.
        l0: mean number of steered features per token.
        l1: mean ``||v||_1`` per token.
        features: one entry per feature that was steered at least once.
    """

    n_tokens: int
    l0: float
    l1: float
    features: tuple[FeatureUse, ...]


@dataclass(frozen=True)
class Ablation(Record):
    """The preference scores left when the steering of a category of features is zeroed.

    Attributes:
        name: the category.
        features: its features.
        scores: with their steering zeroed.
        control: with the steering of as many random features zeroed, once per draw.
    """

    name: str
    features: tuple[int, ...]
    scores: PreferenceScores
    control: tuple[PreferenceScores, ...]

    @property
    def control_loss(self) -> float:
        """Mean SimPO loss over the draws of the control.

        Raises:
            ValueError: if there is no draw.
        """
        if not self.control:
            raise ValueError(f"The ablation of {self.name!r} has no control.")
        return sum(score.loss for score in self.control) / len(self.control)


@dataclass(frozen=True)
class Generation(Record):
    """One prompt continued by the base model and by the trained one."""

    prompt: str
    base: str
    trained: str


@dataclass(frozen=True)
class Summary(Record):
    """What a training run achieved and what carries it.

    Attributes:
        base: scores with the adapter disabled.
        trained: scores with it.
        usage: features steered on the evaluation texts.
        ablations: one per category.
        generations: sample texts before and after.
    """

    base: PreferenceScores
    trained: PreferenceScores
    usage: Usage
    ablations: tuple[Ablation, ...]
    generations: tuple[Generation, ...]


def _build(kind: Any, value: Any) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"Expected the fields of {kind}, got {value!r}.")
        names = {field.name for field in fields(kind)}
        if set(value) != names:
            raise ValueError(f"{kind} has fields {sorted(names)}, the text has {sorted(value)}.")
        hints = typing.get_type_hints(kind)
        return typing.cast(Any, kind)(**{n: _build(hints[n], v) for n, v in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        [inner] = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _build(inner, value)
    if origin is tuple:
        return tuple(_build(arguments[0], item) for item in value)
    return kind(value)
