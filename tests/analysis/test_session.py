"""What every analysis works on: all forms of preference data, tokens that count, the base model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft import PeftModel

import helpers
from peft_fsrl.analysis import Session
from peft_fsrl.training.tokens import Tokenized

TEMPLATE = (
    "{% for message in messages %}{{ 'w30' if message.role == 'user' else 'w31' }} "
    "{{ message.content }} {% endfor %}{% if add_generation_prompt %}w31 {% endif %}"
)


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


FORMS: dict[str, dict[str, Any]] = {
    "messages": {"prompt": chat("w3"), "chosen": answer("w4"), "rejected": answer("w5 w6")},
    "messages, prompt within": {"chosen": chat("w3", "w4"), "rejected": chat("w3", "w5 w6")},
    "text": {"prompt": "w30 w3 w31 ", "chosen": "w4 ", "rejected": "w5 w6 "},
    "text, prompt within": {"chosen": "w30 w3 w31 w4 ", "rejected": "w30 w3 w31 w5 w6 "},
}


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return helpers.fsrl_model()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_pair_is_the_same_pair(model: PeftModel, form: str) -> None:
    tokenizer = helpers.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    session = Session(model, tokenizer, [FORMS[form]])
    assert session.tokens("chosen") == [Tokenized([1, 30, 3, 31, 4, 2], 4)]
    assert session.tokens("rejected") == [Tokenized([1, 30, 3, 31, 5, 6, 2], 4)]


def test_a_stream_is_read_once(model: PeftModel) -> None:
    rows = helpers.tiny_preferences(5).to_list()
    session = Session(model, helpers.tiny_tokenizer(), iter(rows), batch_size=2)
    for _ in range(2):
        batches = list(session.batches("reading"))
        assert [len(batch) for batch in batches] == [4, 4, 2]
    plain = Session(model, helpers.tiny_tokenizer(), rows)
    [all_at_once] = plain.batches("reading")
    assert batches[0] == [*all_at_once[:2], *all_at_once[5:7]]
    assert session.prompts == list(dict.fromkeys(row["prompt"] for row in rows))


def test_rows_that_cannot_be_read_are_named(model: PeftModel) -> None:
    tokenizer = helpers.tiny_tokenizer()
    with pytest.raises(ValueError, match="at least one preference pair"):
        _ = Session(model, tokenizer, []).rows
    with pytest.raises(ValueError, match="column 'rejected', found"):
        Session(model, tokenizer, [{"prompt": "w3", "chosen": " w4"}]).tokens("rejected")
    pair = {"prompt": "w3 w4", "chosen": " w5", "rejected": " w6"}
    with pytest.raises(
        ValueError, match="chosen answer to the prompt 'w3 w4' has no tokens within"
    ):
        Session(model, tokenizer, [pair], max_length=3).tokens("chosen")
    with pytest.raises(ValueError, match="batch_size"):
        Session(model, tokenizer, [pair], batch_size=0)
    tokenizer.eos_token = None
    row = {"prompt": "w3", "chosen": " w4", "rejected": ""}
    with pytest.raises(ValueError, match="rejected answer to the prompt 'w3' has no tokens"):
        Session(model, tokenizer, [row]).tokens("rejected")


def test_long_answers_are_cut_as_a_trainer_cuts_them(model: PeftModel) -> None:
    pair = {"prompt": "w3 w4", "chosen": " w5 w6 w7", "rejected": " w8"}
    session = Session(model, helpers.tiny_tokenizer(), [pair], max_length=5)
    assert session.tokens("chosen") == [Tokenized([1, 3, 4, 5, 6], 3)]
    assert session.tokens("rejected") == [Tokenized([1, 3, 4, 8, 2], 3)]


def test_the_base_is_the_model_without_what_training_changed() -> None:
    base = helpers.tiny_model()
    ids = helpers.token_ids()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    model = helpers.fsrl_model(base, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight += 0.3
        trained = model(input_ids=ids).logits
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        session = Session(model, helpers.tiny_tokenizer())
        with session.base():
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model(input_ids=ids).logits, trained)
        assert not torch.allclose(trained, expected, atol=0.1)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    other = dataclasses.replace(session, dataset=helpers.tiny_preferences(2))
    assert other.model is model
    assert len(other.rows) == 2
