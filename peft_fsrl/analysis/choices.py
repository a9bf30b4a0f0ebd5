"""Multiple-choice tasks as texts that analyses read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any


def choice_rows(tasks: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Question and lettered choices as the prompt, the letter of the right one as the answer.

    Args:
        tasks: rows with ``question``, ``choices`` (a list of texts, or a mapping with their
            ``text`` and ``label``) and the right one: ``answer``, its place from 0 on, or
            ``answerKey``, its label. So are MMLU's and ARC's.

    Returns:
        Rows for a ``Session``: ``prompt`` and ``chosen``.

    Raises:
        ValueError: for a row without these columns, or whose answer is none of its choices.
    """
    return [_row(number, task) for number, task in enumerate(tasks)]


def _row(number: int, task: Mapping[str, Any]) -> dict[str, str]:
    missing = {"question", "choices"} - task.keys()
    if missing or not task.keys() & {"answer", "answerKey"}:
        raise ValueError(
            f"Row {number}: expected the columns 'question', 'choices' and 'answer' or "
            f"'answerKey', found {sorted(task)}."
        )
    choices: Any = task["choices"]
    keyed = isinstance(choices, Mapping)
    texts: Sequence[str] = choices["text"] if keyed else choices
    labels = list(choices["label"]) if keyed else list(ascii_uppercase[: len(texts)])
    answer = task["answer"] if "answer" in task else task["answerKey"]
    label = labels[answer] if isinstance(answer, int) and 0 <= answer < len(labels) else answer
    if label not in labels:
        raise ValueError(f"Row {number}: expected an answer among {labels}, got {answer!r}.")
    lines = [f"{name}. {text}" for name, text in zip(labels, texts, strict=True)]
    return {"prompt": "\n".join([task["question"], *lines, "Answer:"]), "chosen": f" {label}"}
