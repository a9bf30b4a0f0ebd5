"""Prompts as files, and the evidence about a feature as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from ..records import Context, FeatureEvidence

# A token is marked from this share of its context's strongest activation.
_MARKED = 0.5
# Some chat templates write the opening mark into the prompt: the answer has the closing one alone.
_REASONING = re.compile(
    r"<think>.*?(?:</think>|\Z)|\A(?:(?!<think>).)*?</think>", flags=re.DOTALL | re.IGNORECASE
)


@dataclass(frozen=True)
class Category:
    """Something that a feature can be about.

    Attributes:
        name: of the category, as it appears in labels.
        definition: for the judge, in Markdown: what belongs, what does not, borderline cases.
    """

    name: str
    definition: str

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.definition.strip():
            raise ValueError(f"Expected a category with a name and a definition, got {self}.")

    @classmethod
    def from_file(cls, path: str | Path, name: str | None = None) -> Category:
        """A definition from a file, whose name is the category's unless there is another."""
        path = Path(path).expanduser()
        return cls(path.stem if name is None else name, path.read_text("utf-8"))


@cache
def read_prompt(name: str) -> str:
    """One of the package's own prompts."""
    return (files(__package__) / "prompts" / f"{name}.md").read_text("utf-8").strip()


def default_categories() -> tuple[Category, Category]:
    """The package's own: ``alignment`` and ``style``."""
    return (
        Category("alignment", read_prompt("alignment")),
        Category("style", read_prompt("style")),
    )


def chat(system: str, user: str) -> list[dict[str, str]]:
    """A prompt of two messages."""
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def fill(prompt: str, values: Mapping[str, str]) -> str:
    """A prompt with ``{{name}}`` replaced; what is put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], prompt)


def render_evidence(evidence: FeatureEvidence | None, description: str | None) -> str:
    """What is known of a feature, for a judge.

    Raises:
        ValueError: if that is nothing.
    """
    parts = [] if not description else [f"Description: {description}"]
    if evidence is not None and evidence.contexts:
        contexts = [f"{n}. {render_context(c)}" for n, c in enumerate(evidence.contexts, start=1)]
        share = f"active on {evidence.density:.3%} of all tokens"
        parts.append("\n".join([f"Contexts, strongest first ({share}):", *contexts]))
    if evidence is not None and evidence.promoted:
        parts.append(f"Tokens that it promotes: {_quoted(evidence.promoted)}")
        parts.append(f"Tokens that it suppresses: {_quoted(evidence.suppressed)}")
    if not parts:
        raise ValueError(
            "Expected a feature with a description, contexts or tokens to judge by, got nothing."
        )
    return "\n\n".join(parts)


def render_context(context: Context, *, marked: bool = True) -> str:
    """A context on one line, its strongest tokens between ``<<`` and ``>>``."""
    peak = max(map(abs, context.activations), default=0.0)
    text = ""
    for token, activation in zip(context.tokens, context.activations, strict=True):
        if marked and peak and abs(activation) >= _MARKED * peak:
            bare = token.lstrip(" ")
            text += f"{token[: len(token) - len(bare)]}<<{bare or token}>>"
        else:
            text += token
    return text.replace("\n", "\\n")


def conclusion(answer: str) -> str:
    """An answer without a reasoning model's thoughts, emphasis and code quotes."""
    return re.sub(r"[*`]+", "", _REASONING.sub("", answer)).strip()


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(repr(token.strip() or token) for token in tokens)
