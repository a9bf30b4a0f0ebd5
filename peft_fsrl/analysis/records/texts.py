"""What a model says."""

from __future__ import annotations

from dataclasses import dataclass

from ...records import Record


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
