"""What a model says."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Record


@dataclass(frozen=True)
class SteeredFeature(Record):
    """One feature steered at one token, by ``value`` units of feature activation."""

    feature: int
    value: float


@dataclass(frozen=True)
class SteeredToken(Record):
    """A generated token.

    Attributes:
        text: of the token.
        steered: the features steered where it was predicted, largest ``|v|`` first; cut at some
            number.
        n_steered: how many there were.
    """

    text: str
    steered: tuple[SteeredFeature, ...]
    n_steered: int


@dataclass(frozen=True)
class Continuation(Record):
    """One answer to a prompt.

    Attributes:
        name: who answered: ``"base"``, ``"trained"``, or ``"without <category>"``.
        text: the answer, special tokens left out.
        tokens: its tokens and what steered them; empty where nobody looked.
        n_tokens: its length.
    """

    name: str
    text: str
    tokens: tuple[SteeredToken, ...]
    n_tokens: int


@dataclass(frozen=True)
class Generation(Record):
    """One prompt continued by several variants of a model, under the same seed."""

    prompt: str
    continuations: tuple[Continuation, ...]

    def text(self, name: str) -> str:
        """The answer of one variant.

        Raises:
            KeyError: if there is none of that name.
        """
        return {answer.name: answer.text for answer in self.continuations}[name]


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
class VariantCoherence(Record):
    """Coherence of one variant's answers; see ``Continuation`` for the names."""

    name: str
    coherence: Coherence
