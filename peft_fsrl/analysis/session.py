"""The input of every analysis: a model, its tokenizer, preference data, and how to run them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..training.data import pair_texts
from ..training.likelihood import Batch, batched, pad
from ..training.running import as_base
from ..training.tokens import Tokenized, special_ids, tokenize

if TYPE_CHECKING:
    from jaxtyping import Bool

CHOSEN, REJECTED = "chosen", "rejected"
SIDES = (CHOSEN, REJECTED)


@dataclass(frozen=True, eq=False)
class Session:
    """The first argument of every analysis.

    Rows are turned into text and into tokens once, when they are first needed. Another model or
    other data make another session: ``dataclasses.replace(session, dataset=rows)``.

    Args:
        model: a causal language model, usually with an FSRL adapter. Every analysis restores its
            mode, its adapters and the state of the random generators.
        tokenizer: the model's tokenizer.
        dataset: preference pairs in any form that TRL takes: text or messages, with the prompt in a
            column of its own or as the common start of both answers. A stream is read to its end:
            take as many rows as you want with ``stream.take(n)``. Analyses that read one answer
            alone (use, composition, firing) take rows without the other, and any text: in a column
            ``text``, as the whole of a chosen answer. ``choice_rows`` makes texts of
            multiple-choice tasks.
        batch_size: rows per forward pass; a pair is two texts.
        max_length: cuts the end of a longer answer, never the prompt, as TRL's trainers do.
        seed: of every random choice: sampling, draws, bootstraps.
        beta: SimPO's reward scale.
        gamma: SimPO's target margin, TRL's ``simpo_gamma`` (the paper's gamma/beta times beta).
        progress: show progress bars.

    Example:
        ``session = Session(model, tokenizer, held_out)``, then ``score_preferences(session)`` and,
        for the base model, ``with session.base(): score_preferences(session)``.
    """

    model: nn.Module
    tokenizer: Any
    dataset: Iterable[Mapping[str, Any]] = ()
    batch_size: int = 16
    max_length: int | None = None
    seed: int = 0
    beta: float = 10.0
    gamma: float = 5.0
    progress: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"Expected a `batch_size` of at least 1, got {self.batch_size}.")
        if not (math.isfinite(self.beta) and self.beta > 0 and math.isfinite(self.gamma)):
            raise ValueError(
                f"Expected a `beta` above 0 and a finite `gamma`, got {self.beta} and {self.gamma}."
            )

    def base(self) -> AbstractContextManager[None]:
        """Within this block the model is the base model: no steering, no ``modules_to_save``."""
        return as_base(self.model)

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """The data as text, with the chat template applied where it holds messages.

        Raises:
            ValueError: for no row.
        """
        rows = [self._as_text(row) for row in self.dataset]
        if not rows:
            raise ValueError("Expected at least one preference pair, found none.")
        return rows

    @property
    def prompts(self) -> list[str]:
        """The different prompts as text, in the order of the data."""
        return list(dict.fromkeys(row["prompt"] for row in self.rows))

    def tokens(self, side: str) -> list[Tokenized]:
        """Prompt and answer of every row as token ids.

        Args:
            side: the column of the answers.

        Raises:
            ValueError: if there is no such column, or for an answer without tokens.
        """
        if side not in self._tokens:
            self._tokens[side] = [self._tokenize(row, side) for row in self.rows]
        return self._tokens[side]

    def batches(self, doing: str, sides: Sequence[str] = SIDES) -> Iterator[list[Tokenized]]:
        """``batch_size`` rows at a time: all texts of the first side, then all of the next.

        Args:
            doing: shown beside the progress bar.
            sides: columns of answers.
        """
        columns = [self.tokens(side) for side in sides]
        with self.bar(doing, len(self.rows)) as bar:
            for numbers in batched(range(len(self.rows)), self.batch_size):
                yield [column[number] for column in columns for number in numbers]
                bar.update(len(numbers))

    def pad(self, texts: Sequence[Tokenized]) -> Batch:
        """Texts as one right-padded batch on the model's device."""
        return pad(texts, next(self.model.parameters()).device)

    def counted(self, batch: Batch) -> Bool[Tensor, "batch seq"]:
        """The tokens that count: neither padding nor special; see ``special_ids``."""
        special = self._special.to(batch.input_ids.device)
        return batch.attention_mask.bool() & ~torch.isin(batch.input_ids, special)

    def bar(self, doing: str, total: int | None = None, unit: str = "row") -> Any:
        """A progress bar, shown if ``progress`` asks for it."""
        return tqdm(desc=doing, total=total, unit=unit, disable=not self.progress, leave=False)

    @cached_property
    def _tokens(self) -> dict[str, list[Tokenized]]:
        return {}

    @cached_property
    def _special(self) -> Tensor:
        return torch.tensor(special_ids(self.tokenizer))

    def _as_text(self, row: Mapping[str, Any]) -> dict[str, str]:
        if all(side in row for side in SIDES):
            return pair_texts([row], self.tokenizer)[0]
        if CHOSEN not in row and "text" in row:
            return {"prompt": "", **row, CHOSEN: row["text"]}
        return {"prompt": "", **row}

    def _tokenize(self, row: Mapping[str, str], side: str) -> Tokenized:
        if side not in row:
            raise ValueError(
                f"Expected a column {side!r}, found {sorted(row)}. Rename columns with "
                "`dataset.rename_columns({...})`."
            )
        text = tokenize(row["prompt"], row[side], self.tokenizer, self.max_length)
        if len(text.input_ids) <= text.n_prompt:
            raise ValueError(
                f"The {side} answer to the prompt {row['prompt'][:80]!r} has no tokens"
                + (f" within max_length={self.max_length}." if self.max_length else ".")
            )
        return text
