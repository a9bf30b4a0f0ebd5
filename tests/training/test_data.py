"""Preference data before training: what the check says against what TRL's trainer really does."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import fsrl_model, tiny_preferences, tiny_tokenizer
from peft_fsrl import with_fsrl
from peft_fsrl.training import (
    SimPOConfig,
    SimPOTrainer,
    StableSimPOConfig,
    StableSimPOTrainer,
)
from peft_fsrl.training.data import (
    PreferenceReport,
    check_columns,
    pair_texts,
    prepare_preferences,
    prompt_texts,
)
from peft_fsrl.training.tokens import Tokenized, prompt_ids, tokenize

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters a to f, where "ab", "cd" and "abcd" are single tokens; with a chat template."""
    names = ["<pad>", "<s>", "</s>", *"abcdef ?!", "ab", "cd", "abcd"]
    merges = [("a", "b"), ("c", "d"), ("ab", "cd")]
    words = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(words, merges, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    roles = ["<user>", "<assistant>", "<system>"]
    tokenizer.add_special_tokens([AddedToken(role) for role in roles])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


def trainer_on(dataset: Any, tokenizer: Any, folder: Path, max_length: int, **settings: Any) -> Any:
    args = SimPOConfig(
        str(folder),
        max_length=max_length,
        per_device_train_batch_size=2,
        max_steps=2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **settings,
    )
    return with_fsrl(SimPOTrainer)(
        model=fsrl_model(), args=args, train_dataset=dataset, processing_class=tokenizer
    )


def tokenized(trainer: Any, side: str) -> list[Tokenized]:
    return [
        Tokenized(row[f"{side}_input_ids"], sum(label == -100 for label in row[f"{side}_labels"]))
        for row in trainer.train_dataset
    ]


def said(*contents: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]


@pytest.mark.parametrize("max_length", [512, 9, 5])
def test_tokenize_is_the_trainers(max_length: int, tmp_path: Path) -> None:
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice("abcd ") for _ in range(rng.randint(low, high)))

    rows = [
        {"prompt": "a" + text(0, 5), "chosen": "b" + text(0, 8), "rejected": text(1, 8) + "e"}
        for _ in range(40)
    ]
    tokenizer = merging_tokenizer()
    trainer = trainer_on(Dataset.from_list(rows), tokenizer, tmp_path, max_length)
    for side in ("chosen", "rejected"):
        ours = [tokenize(row["prompt"], row[side], tokenizer, max_length) for row in rows]
        assert ours == tokenized(trainer, side)
    merged = [len(prompt_ids(row["prompt"], tokenizer)) for row in rows]
    assert merged != [each.n_prompt for each in tokenized(trainer, "chosen")]


QUESTION, ANSWERS = "ab cd", (" ef", " fe ab")
FORMATS = {
    "plain": {"prompt": QUESTION, "chosen": ANSWERS[0], "rejected": ANSWERS[1]},
    "plain, implicit": {"chosen": QUESTION + ANSWERS[0], "rejected": QUESTION + ANSWERS[1]},
    "messages": {
        "prompt": said(QUESTION),
        "chosen": said("", ANSWERS[0])[1:],
        "rejected": said("", ANSWERS[1])[1:],
    },
    "messages, implicit": {
        "chosen": said(QUESTION, ANSWERS[0]),
        "rejected": said(QUESTION, ANSWERS[1]),
    },
    # As in many a published data set.
    "messages beside a text prompt": {
        "prompt": QUESTION,
        "chosen": said(QUESTION, ANSWERS[0]),
        "rejected": said(QUESTION, ANSWERS[1]),
        "messages": said(QUESTION, ANSWERS[0]),
        "score": 0.5,
    },
}


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reaches_the_trainer(name: str, streaming: bool, tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    dataset: Any = Dataset.from_list([FORMATS[name]] * 2)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    prepared = prepare_preferences(dataset, tokenizer, max_length=64)
    trainer = trainer_on(prepared.dataset, tokenizer, tmp_path, 64)
    start, end = ("<user>", "<assistant>") if "messages" in name else ("", "")
    prompt = tokenizer(f"<s>{start}{QUESTION}{end}", add_special_tokens=False)["input_ids"]
    for side, answer in zip(("chosen", "rejected"), ANSWERS, strict=True):
        # Of an implicit prompt in plain text, the common space belongs to the answers.
        ids = tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"]
        assert tokenized(trainer, side) == [Tokenized(prompt + ids, len(prompt))] * 2
    texts = prompt_texts(prepared.dataset, tokenizer, 1)
    assert [prompt_ids(text, tokenizer) for text in texts] == [prompt]
    assert len(list(prepared.dataset)) == 2
    assert (prepared.report.rows, prepared.report.kept) == (2, 2)
    if "score" in FORMATS[name]:
        assert [row["score"] for row in prepared.dataset] == [0.5, 0.5]


GOOD = {"prompt": "w3 w4", "chosen": " w5 w6", "rejected": " w7"}
TALK = {"prompt": said("a"), "chosen": said("", "b")[1:], "rejected": said("", "c")[1:]}
LONG = " ".join(["w3"] * 20)
BAD = {
    "empty": (GOOD, {"chosen": ""}, "'chosen': an empty answer"),
    "blank": (GOOD, {"rejected": " \n"}, "'rejected': an empty answer"),
    "missing": (GOOD, {"chosen": None}, "'chosen': an empty answer"),
    "nothing said": (TALK, {"chosen": said("", "")[1:]}, "'chosen': an empty answer"),
    "no message": (TALK, {"rejected": []}, "'rejected': an empty answer"),
    "equal": (GOOD, {"chosen": " w7"}, "'rejected': the same answer as 'chosen'"),
    "equal talk": (TALK, {"chosen": TALK["rejected"]}, "the same answer as 'chosen'"),
    "equal tokens": (GOOD, {"chosen": "  w7"}, "'rejected': the same tokens as 'chosen'"),
    "missing prompt": (GOOD, {"prompt": None}, "'prompt': no prompt"),
    "no messages": (TALK, {"prompt": []}, "'prompt': no prompt"),
    "long prompt": (
        GOOD,
        {"prompt": LONG},
        "a prompt that fills max_length=12.*Raise max_length above 21, set shorten_prompts=True",
    ),
    "cut alike": (
        GOOD,
        {"chosen": f" {LONG} w5", "rejected": f" {LONG} w6"},
        "an answer that max_length=12 makes equal to 'chosen'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_rows(name: str, caplog: pytest.LogCaptureFixture) -> None:
    good, change, message = BAD[name]
    tokenizer = tiny_tokenizer() if good is GOOD else merging_tokenizer()
    dataset = Dataset.from_list([good, {**good, **change}, good])
    for data in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match=rf"(?s)^Row 1 .*{message}.*unusable='drop'"):
            list(prepare_preferences(data, tokenizer, max_length=12).dataset)
        caplog.clear()
        prepared = prepare_preferences(data, tokenizer, max_length=12, unusable="drop")
        assert [row["chosen"] for row in prepared.dataset] == [good["chosen"]] * 2
        assert (prepared.report.rows, prepared.report.kept) == (3, 2)
        assert sum(prepared.report.unusable.values()) == 1
        assert any(record.levelno == logging.WARNING for record in caplog.records)


def test_the_count_names_every_reason() -> None:
    rows = [GOOD, {**GOOD, "chosen": ""}, {**GOOD, "prompt": LONG}, {**GOOD, "rejected": ""}]
    with pytest.raises(ValueError, match=r"1 of 4 .*a prompt that fills .*: 1, an empty answer: 2"):
        prepare_preferences(Dataset.from_list(rows), tiny_tokenizer(), max_length=12)
    with pytest.raises(ValueError, match="at least one usable preference pair, found 0 of 2"):
        prepare_preferences(
            Dataset.from_list(rows[1:3]), tiny_tokenizer(), max_length=12, unusable="drop"
        )


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_what_is_refused_would_have_ruined_the_training(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**GOOD, "prompt": LONG}, GOOD])
    kept = prepare_preferences(rows, tiny_tokenizer(), max_length=12, unusable="drop").dataset
    trainer_on(kept, tiny_tokenizer(), tmp_path, 12).train()
    with pytest.raises(FloatingPointError, match=r"step 1 is nan.*without tokens divides by zero"):
        trainer_on(rows, tiny_tokenizer(), tmp_path, 12).train()


TOOL = {"name": "a", "description": "b c"}


@pytest.mark.parametrize("form", [[TOOL], json.dumps([TOOL])], ids=["list", "JSON"])
def test_a_template_is_given_the_rows_tools(form: Any, tmp_path: Path) -> None:
    """A prompt that only its tools make too long is found, as by a trainer that renders them."""
    tokenizer = merging_tokenizer()
    tools = "{% for tool in tools or [] %}{{ tool['name'] * 9 }}{% endfor %}"
    tokenizer.chat_template = tools + tokenizer.chat_template
    rows = Dataset.from_list([{**TALK, "tools": form}, {**TALK, "tools": form}])
    assert prompt_texts(rows, tokenizer, 1)[0].startswith("aaaaaaaaa")
    assert pair_texts(rows, tokenizer)[0]["prompt"].startswith("aaaaaaaaa")
    bare = rows.remove_columns("tools")
    length = len(tokenizer(prompt_texts(bare, tokenizer, 1)[0])["input_ids"]) + 6
    assert prepare_preferences(bare, tokenizer, max_length=length).report.kept == 2
    with pytest.raises(ValueError, match="a prompt that fills max_length"):
        prepare_preferences(rows, tokenizer, max_length=length)
    prepared = prepare_preferences(rows, tokenizer, max_length=length + 9).dataset
    assert prepared[0]["tools"] == form
    args = {"max_length": length + 9, "use_cpu": True, "bf16": False, "report_to": "none"}
    trainer = with_fsrl(StableSimPOTrainer)(
        fsrl_model(),
        args=StableSimPOConfig(str(tmp_path), **args),
        train_dataset=prepared,
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == 2


def test_shortened_prompts_keep_answers_whole(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    words = [f"w{i}" for i in range(3, 23)]
    row = {"prompt": " ".join(words), "chosen": " w5 w6 w7", "rejected": " w7"}
    prepared = prepare_preferences(
        Dataset.from_list([row]), tokenizer, max_length=12, shorten_prompts=True
    )
    # Twelve places: BOS, three words and EOS leave seven of the prompt.
    assert prepared.dataset[0]["prompt"].split() == words[-7:]
    assert (prepared.report.shortened, prepared.report.truncated) == (1, 0)
    trainer = trainer_on(prepared.dataset, tokenizer, tmp_path, 12)
    [(ids, n_prompt)] = tokenized(trainer, "chosen")
    assert (len(ids), ids[n_prompt:]) == (12, [5, 6, 7, 2])
    # Against an answer that does not fit, half of the room is the prompt's.
    prepared = prepare_preferences(
        Dataset.from_list([{**row, "chosen": f" {LONG}"}]),
        tokenizer,
        max_length=12,
        shorten_prompts=True,
    )
    assert prepared.dataset[0]["prompt"].split() == words[-5:]
    assert (prepared.report.shortened, prepared.report.truncated) == (1, 1)


def test_shortened_conversations_lose_their_oldest_exchanges() -> None:
    tokenizer = merging_tokenizer()
    system = {"role": "system", "content": "e"}
    talk = said("a a a a", "b", "c", "d", "f")
    row = {**TALK, "prompt": [system, *talk]}

    def shortened(max_length: int) -> Any:
        return prepare_preferences(
            Dataset.from_list([row]), tokenizer, max_length=max_length, shorten_prompts=True
        ).dataset[0]["prompt"]

    assert shortened(40) == [system, *talk]
    assert shortened(15) == [system, *talk[2:]]
    assert shortened(9) == [system, talk[4]]
    with pytest.raises(ValueError, match="a prompt that fills max_length=5"):
        shortened(5)


def test_a_stream_is_read_row_by_row() -> None:
    seen = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(1000):
            seen.append(number)
            yield {**GOOD, "chosen": "" if number == 5 else GOOD["chosen"]}

    prepared = prepare_preferences(
        IterableDataset.from_generator(rows), tiny_tokenizer(), max_length=12
    )
    # One row, for its columns.
    assert len(seen) <= 1
    stream = iter(prepared.dataset)
    assert [next(stream)["prompt"] for _ in range(5)] == ["w3 w4"] * 5
    assert prepared.report.rows == 5
    assert max(seen) == 4
    with pytest.raises(ValueError, match="Row 5 cannot be trained on, column 'chosen'"):
        next(stream)


def test_the_trainer_takes_a_prepared_stream(tmp_path: Path) -> None:
    settings = {"accelerator_config": {"dispatch_batches": False}, "max_grad_norm": 1e-9}
    dataset, weights = tiny_preferences(4), []
    for data in (dataset, dataset.to_iterable_dataset()):
        prepared = prepare_preferences(data, tiny_tokenizer(), max_length=64)
        trainer = trainer_on(prepared.dataset, tiny_tokenizer(), tmp_path, 64, **settings)
        trainer.get_train_dataloader()
        weights.append([row["chosen_input_ids"] for row in trainer.train_dataset])
        assert trainer.train().global_step == 2
    assert weights[0] == weights[1]


def test_wrong_requests() -> None:
    check_columns(["id", "chosen", "rejected"])
    with pytest.raises(ValueError, match=r"found \['chosen', 'question'\].*'rejected'\] missing"):
        check_columns(["question", "chosen"])
    questions = Dataset.from_list([{"question": "w3", "answer": "w4"}])
    for data in (questions, questions.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"found \['answer', 'question'\]"):
            prepare_preferences(data, tiny_tokenizer(), max_length=12)
    with pytest.raises(ValueError, match=r"`unusable` must be one of .*, got 'ignore'"):
        prepare_preferences(tiny_preferences(), tiny_tokenizer(), max_length=9, unusable="ignore")


def test_the_report_reads_well() -> None:
    report = PreferenceReport(rows=10, truncated=2, shortened=1)
    report.unusable.update({"an empty answer": 3})
    assert str(report) == (
        "7 of 10 preference rows usable (an empty answer: 3); max_length cuts an answer of 2; "
        "prompts shortened: 1"
    )
