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
class Coherence(Record):
    """Whether sampled answers are still language. Compare with the base model's own answers.

    Attributes:
        n: number of answers.
        perplexity: of all answers' tokens under the base model; rises where the steered model says
            what the base model would not.
        repetition: share of an answer's 4-grams that it has said before, mean over answers.
        distinct_1: different tokens over tokens, of all answers together.
        distinct_2: the same with pairs of consecutive tokens.
        mean_length: tokens per answer.
        ended: share of answers that ended by themselves.
    """

    n: int
    perplexity: float
    repetition: float
    distinct_1: float
    distinct_2: float
    mean_length: float
    ended: float


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


@dataclass(frozen=True)
class FeatureEffect(Record):
    """What a little constant steering of one feature does to the loss.

    Attributes:
        feature: index in the SAE.
        slope: derivative of the loss with respect to ``v`` of this feature at every token, at zero:
            negative where promoting it lowers the loss.
        error: standard error of the slope, over pairs.
    """

    feature: int
    slope: float
    error: float


@dataclass(frozen=True)
class LayerEffect(Record):
    """First-order effect of steering at one layer on the preference loss, before any training.

    Both figures say how fast the loss falls per unit of ``||v||_1`` at every token, so both can be
    compared with ``l1_coeff``: one that is larger leaves nothing to be gained to first order. An
    adapter can do more than the first, which steers every token alike, and less than the second,
    which steers each token of each answer as suits it best.

    Attributes:
        layer: the steered layer.
        constant: with the best single feature, the same at every token.
        per_token: with the best feature at each token.
        n_pairs: preference pairs measured.
        features: the features with the largest slopes, largest first.
    """

    layer: int
    constant: float
    per_token: float
    n_pairs: int
    features: tuple[FeatureEffect, ...]


@dataclass(frozen=True)
class SweepPoint(Record):
    """One run of a sweep, a row of its table. Figures are None for a run that failed.

    Attributes:
        stage: the part of the sweep that it belongs to.
        name: of the run, and of its folder.
        layer: the steered layer.
        seed: of data, order and start.
        l1_coeff: weight of the L1 penalty.
        l0_coeff: weight of the L0 penalty.
        loss: held-out preference loss.
        accuracy: held-out preference accuracy.
        l0: steered features per held-out token.
        l1: norm of the steering vector per held-out token.
        perplexity: of sampled answers under the base model; see ``Coherence``.
        perplexity_unsteered: of the base model's own answers.
        repetition: see ``Coherence``.
        distinct_2: see ``Coherence``.
        seconds: wall time.
        command: what was run.
    """

    stage: str
    name: str
    layer: int
    seed: int
    l1_coeff: float
    l0_coeff: float
    loss: float | None
    accuracy: float | None
    l0: float | None
    l1: float | None
    perplexity: float | None
    perplexity_unsteered: float | None
    repetition: float | None
    distinct_2: float | None
    seconds: float | None
    command: str

    @property
    def finished(self) -> bool:
        """Whether the run has its figures."""
        return self.loss is not None


@dataclass(frozen=True)
class StandIn(Record):
    """How well single LoRAs of several ranks stand for an adapter.

    Attributes:
        target: what carries the LoRA.
        ranks: the ranks.
        errors: share of the squared change of the residual stream that each misses.
        kl: mean KL divergence from the steered model on held-out tokens, in nats.
        losses: SimPO loss on held-out pairs.
    """

    target: str
    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    kl: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Correspondence(Record):
    """An adapter seen as LoRA: token by token, as one for all, and in few features.

    Attributes:
        token_ranks: rank of the LoRA that it is at each token.
        token_radii: how far each is exact, as a share of the token's own norm.
        base_kl: mean KL divergence of the base model from the steered one.
        base_loss: SimPO loss of the base model.
        steered_loss: SimPO loss of the steered model.
        stand_ins: single LoRAs, one entry per place.
        n_features: numbers of features with which the adapter was refitted blindly.
        spanned: share of the change in their span.
        explained: share that the refitted adapter explains.
    """

    token_ranks: tuple[int, ...]
    token_radii: tuple[float, ...]
    base_kl: float
    base_loss: float
    steered_loss: float
    stand_ins: tuple[StandIn, ...]
    n_features: tuple[int, ...]
    spanned: tuple[float, ...]
    explained: tuple[float, ...]


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
