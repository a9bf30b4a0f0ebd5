"""Multiple-choice tasks as texts, in the forms of two well-known ones."""

from __future__ import annotations

from typing import Any

import pytest

import helpers
from peft_fsrl.analysis import Session, choice_rows, compute_usage


def test_both_forms_are_read() -> None:
    mmlu = {"question": "w3 w4", "choices": ["w5", "w6"], "answer": 1}
    arc = {
        "question": "w3 w4",
        "choices": {"text": ["w5", "w6"], "label": ["1", "2"]},
        "answerKey": "2",
    }
    first, second = choice_rows([mmlu, arc])
    assert first == {"prompt": "w3 w4\nA. w5\nB. w6\nAnswer:", "chosen": " B"}
    assert second == {"prompt": "w3 w4\n1. w5\n2. w6\nAnswer:", "chosen": " 2"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a"]}, "Row 0: expected the columns .*'answerKey', found"),
        ({"question": "q", "choices": ["a"], "answer": 1}, r"an answer among \['A'\], got 1"),
        ({"question": "q", "choices": ["a"], "answer": -1}, r"an answer among \['A'\], got -1"),
    ],
)
def test_what_is_no_task_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choice_rows([row])


def test_use_on_plain_text_is_use_on_an_answer_without_a_prompt() -> None:
    model, tokenizer = helpers.fsrl_model(), helpers.tiny_tokenizer()
    texts = ["w5 w6 w7 w8", "w9 w10"]
    plain = compute_usage(Session(model, tokenizer, [{"text": text} for text in texts]))
    rows = [{"prompt": "", "chosen": text} for text in texts]
    assert plain == compute_usage(Session(model, tokenizer, rows))
    assert plain.n_tokens == 6
    with pytest.raises(ValueError, match="Expected a column 'rejected'"):
        compute_usage(Session(model, tokenizer, [{"text": "w5"}]), segment="rejected")
