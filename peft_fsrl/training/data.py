"""Preference data, checked and prepared before a trainer of TRL gets it.

Formats, prompts and chat templates are TRL's own. This module finds and names rows that cannot be
trained on before the first step, which TRL does not.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, Value
from trl.data_utils import is_conversational, maybe_apply_chat_template, maybe_extract_prompt

from .tokens import Tokenized, tokenize

logger = logging.getLogger(__name__)

UNUSABLE = ("error", "drop")
_Settings = tuple[Any, "int | None", bool]
_SIDES = ("chosen", "rejected")
_PAIR = ("prompt", *_SIDES)
# What a chat template is given beside the messages.
_FOR_TEMPLATES = ("tools", "chat_template_kwargs")
# With one of these beside a preference pair, TRL takes the row for another task's and refuses it.
_OTHER_TASKS = ("messages", "completion", "label")
_NOTES = Features(
    {
        "_column": Value("string"),
        "_problem": Value("string"),
        "_advice": Value("string"),
        "_truncated": Value("bool"),
        "_shortened": Value("bool"),
    }
)


class Prepared(NamedTuple):
    """What ``prepare_preferences`` returns.

    Attributes:
        dataset: columns ``prompt``, ``chosen``, ``rejected``, text or messages as before, and all
            others that the data had, except those that TRL would misread.
        report: what was found; for a stream, in its latest reading by this process, so far.
    """

    dataset: Any
    report: PreferenceReport


@dataclass
class PreferenceReport:
    """Counts of what a preference data set holds.

    Attributes:
        rows: rows seen.
        unusable: rows that nothing can be learned from, by reason.
        truncated: rows with an answer that ``max_length`` cuts.
        shortened: rows whose prompt was shortened.
    """

    rows: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    shortened: int = 0

    @property
    def kept(self) -> int:
        """Rows that are left."""
        return self.rows - self.unusable.total()

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.unusable.items()))
        return (
            f"{self.kept} of {self.rows} preference rows usable"
            + (f" ({reasons})" if reasons else "")
            + (f"; max_length cuts an answer of {self.truncated}" if self.truncated else "")
            + (f"; prompts shortened: {self.shortened}" if self.shortened else "")
        )


def prompt_texts(dataset: Iterable[Mapping[str, Any]], tokenizer: Any, n: int) -> list[str]:
    """The first ``n`` prompts of a preference data set as text, with the chat template applied."""
    pairs = (_extract(row) for row in itertools.islice(dataset, n))
    return [_as_text(pair, tokenizer)["prompt"] for pair in pairs]


def pair_texts(
    dataset: Iterable[Mapping[str, Any]], tokenizer: Any, n: int | None = None
) -> list[dict[str, str]]:
    """The first ``n`` pairs as texts ``prompt``, ``chosen`` and ``rejected``; None takes all.

    The chat template is applied where rows hold messages.
    """
    pairs = (_extract(row) for row in itertools.islice(dataset, n))
    texts = (_as_text(pair, tokenizer) for pair in pairs)
    return [{name: text[name] for name in _PAIR} for text in texts]


def prepare_preferences(
    dataset: Dataset | IterableDataset,
    tokenizer: Any,
    *,
    max_length: int | None,
    unusable: str = "error",
    shorten_prompts: bool = False,
    num_proc: int | None = None,
) -> Prepared:
    """Check every row of a preference data set, and make prompts explicit, before any training.

    A row is unusable if it has no prompt, if an answer is empty, if both answers are the same, in
    their text or in their tokens, or are the same once ``max_length`` has cut them, or if the
    prompt alone fills ``max_length``: the trainer would then divide by zero, log a loss of 0.0 and
    turn every parameter into NaN.

    Args:
        dataset: rows in any of TRL's preference formats: text or messages, with the prompt in a
            column of its own or as the common start of both answers. A stream is checked row by row
            while it is read.
        tokenizer: the model's tokenizer, with its chat template.
        max_length: the trainer's; None for a trainer that cuts nothing.
        unusable: ``"error"`` raises at the first such row, ``"drop"`` leaves them out and counts.
        shorten_prompts: shorten a prompt that would cost an answer its end: text loses its
            beginning, a conversation its oldest exchanges (never a system message or the last
            question). A prompt keeps half of ``max_length`` against answers that are longer.
        num_proc: processes, for a data set that is not a stream.

    Returns:
        The data set, and a report, which is also logged.

    Raises:
        ValueError: for missing columns, for no usable row at all, or, with ``"error"``, for an
            unusable row: its number, its column and what to do. A stream raises it when it comes to
            the row.
    """
    if unusable not in UNUSABLE:
        raise ValueError(f"`unusable` must be one of {UNUSABLE}, got {unusable!r}.")
    # A stream may not know its columns before its first row is read.
    columns = dataset.column_names or list(next(iter(dataset), {}))
    check_columns(columns)
    dataset = dataset.remove_columns([name for name in _OTHER_TASKS if name in columns])
    report = PreferenceReport()
    settings = (tokenizer, max_length, shorten_prompts)
    if isinstance(dataset, IterableDataset):
        return Prepared(_prepare_stream(dataset, settings, unusable, report), report)
    notes = dataset.map(
        _examine,
        fn_kwargs={"settings": settings},
        remove_columns=dataset.column_names,
        features=_NOTES,
        num_proc=num_proc,
        desc="Checking preference pairs",
    )
    bad = {}
    for index, note in enumerate(notes):
        _count(report, note)
        if note["_problem"]:
            bad[index] = note
    if bad and unusable == "error":
        raise ValueError(f"{_describe(*next(iter(bad.items())))} In all, {report}.")
    if not report.kept:
        raise ValueError(f"Expected at least one usable preference pair, found {report}.")
    logger.log(logging.WARNING if bad or report.truncated else logging.INFO, "%s", report)
    usable = dataset.select([index for index in range(len(dataset)) if index not in bad])
    explicit = usable.map(
        _make_explicit,
        fn_kwargs={"settings": settings},
        num_proc=num_proc,
        desc="Extracting prompts",
    )
    return Prepared(explicit, report)


def check_columns(columns: Iterable[str]) -> None:
    """Refuse a data set that is not one of preference pairs; the prompt may be implicit.

    Raises:
        ValueError: if ``chosen`` or ``rejected`` is missing.
    """
    present = set(columns)
    missing = [name for name in _SIDES if name not in present]
    if missing:
        raise ValueError(
            f"Expected a preference data set with columns {list(_PAIR)}, found {sorted(present)}: "
            f"{missing} missing. Rename the columns with `dataset.rename_columns({{...}})`."
        )


def _prepare_stream(
    dataset: IterableDataset, settings: _Settings, unusable: str, report: PreferenceReport
) -> IterableDataset:
    def check(row: dict[str, Any], index: int) -> dict[str, Any]:
        if index == 0:
            # A stream is read again for each evaluation, and once more for each look inside.
            vars(report).update(vars(PreferenceReport()))
        note = _examine(row, settings)
        _count(report, note)
        if not note["_problem"]:
            return {**_make_explicit(row, settings), "_problem": ""}
        if unusable == "error":
            raise ValueError(_describe(index, note))
        logger.warning("Left out. %s", _describe(index, note))
        return {"_problem": note["_problem"]}

    examined = dataset.map(check, with_indices=True).filter(lambda row: not row["_problem"])
    return examined.remove_columns("_problem")


def _count(report: PreferenceReport, note: Mapping[str, Any]) -> None:
    report.rows += 1
    if note["_problem"]:
        report.unusable[note["_problem"]] += 1
    else:
        report.truncated += note["_truncated"]
        report.shortened += note["_shortened"]


def _describe(index: int, note: Mapping[str, Any]) -> str:
    return (
        f"Row {index} cannot be trained on, column {note['_column']!r}: {note['_problem']}. "
        f"{note['_advice']}, or leave such rows out with unusable='drop'."
    )


def _extract(row: Mapping[str, Any]) -> dict[str, Any]:
    pair = {name: row[name] for name in (*_PAIR, *_FOR_TEMPLATES) if name in row}
    return {**pair, **maybe_extract_prompt(pair)}


def _as_text(pair: Mapping[str, Any], tokenizer: Any) -> dict[str, str]:
    """Messages as text, with the row's tools, which may be written as JSON."""
    tools = pair.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    text: dict[str, str] = maybe_apply_chat_template(dict(pair), tokenizer, tools=tools)
    return text


def _examine(row: Mapping[str, Any], settings: _Settings) -> dict[str, Any]:
    """What is wrong with a row, if anything, as the columns of ``_NOTES``."""
    tokenizer, max_length, _ = settings
    note = {"_column": "", "_problem": "", "_advice": "", "_truncated": False, "_shortened": False}

    def problem(column: str, what: str, advice: str) -> dict[str, Any]:
        return {**note, "_column": column, "_problem": what, "_advice": advice}

    # Before the prompt is extracted, which fails on what is empty without saying where.
    if row.get("prompt", "") in (None, []):
        return problem("prompt", "no prompt", "Fill it")
    for side in _SIDES:
        if not isinstance(row[side], str | list | None):
            return problem(side, "neither text nor messages", "Turn it into text")
    empty = [side for side in _SIDES if _is_empty(row[side])]
    pair = row if empty else _extract(row)
    empty = empty or [side for side in _SIDES if _is_empty(pair[side])]
    if empty:
        return problem(empty[0], "an empty answer", "Fill it")
    if pair["chosen"] == pair["rejected"]:
        return problem("rejected", "the same answer as 'chosen'", "Give it another answer")
    explicit = _make_explicit(row, settings)
    whole = _tokenize_pair(explicit, tokenizer)
    cut = {side: each.cut(max_length) for side, each in whole.items()}
    full = [side for side in _SIDES if len(cut[side].input_ids) == cut[side].n_prompt]
    if full:
        tokens = cut[full[0]].n_prompt
        what = f"a prompt that fills max_length={max_length}"
        return problem(full[0], what, f"Raise max_length above {tokens}, set shorten_prompts=True")
    if whole["chosen"] == whole["rejected"]:
        return problem("rejected", "the same tokens as 'chosen'", "Give it another answer")
    if cut["chosen"] == cut["rejected"]:
        what = f"an answer that max_length={max_length} makes equal to 'chosen'"
        return problem("rejected", what, "Raise max_length")
    note["_truncated"] = any(whole[side] != cut[side] for side in _SIDES)
    note["_shortened"] = explicit["prompt"] != pair["prompt"]
    return note


def _is_empty(answer: Any) -> bool:
    if answer is None or isinstance(answer, str):
        return not (answer or "").strip()
    content = answer[-1].get("content") if answer else None
    if isinstance(content, str):
        content = content.strip()
    return not answer or not (content or answer[-1].get("tool_calls"))


def _make_explicit(row: Mapping[str, Any], settings: _Settings) -> dict[str, Any]:
    """The row with its prompt in a column of its own, shortened if that was asked for."""
    tokenizer, max_length, shorten_prompts = settings
    pair = _extract(row)
    if not shorten_prompts or max_length is None:
        return pair
    shorten = _drop_exchange if is_conversational(pair) else _drop_tokens
    while True:
        both = _tokenize_pair(pair, tokenizer).values()
        excess = max(len(each.input_ids) for each in both) - max_length
        # Against an answer that would not fit anyway, a prompt keeps half of the room.
        excess = min(excess, max(each.n_prompt for each in both) - max_length // 2)
        shorter = shorten(pair["prompt"], excess, tokenizer) if excess > 0 else None
        if shorter is None:
            return pair
        pair = {**pair, "prompt": shorter}


def _drop_tokens(prompt: str, excess: int, tokenizer: Any) -> str | None:
    """A text without its first ``excess`` tokens; None where nothing can go."""
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    starts = [start for start, _ in offsets[excess:] if start > 0]
    return prompt[starts[0] :] if starts else None


def _drop_exchange(
    prompt: list[dict[str, Any]], excess: int, tokenizer: Any
) -> list[dict[str, Any]] | None:
    """A conversation without its oldest exchange; None where only one is left."""
    kept = 1 if prompt[0]["role"] == "system" else 0
    questions = [i for i, message in enumerate(prompt) if i > kept and message["role"] == "user"]
    return [*prompt[:kept], *prompt[questions[0] :]] if questions else None


def _tokenize_pair(pair: Mapping[str, Any], tokenizer: Any) -> dict[str, Tokenized]:
    text = _as_text(pair, tokenizer)
    return {side: tokenize(text["prompt"], text[side], tokenizer) for side in _SIDES}
