"""Prompts and answers as token ids, in the way of TRL's preference trainers."""

from __future__ import annotations

from typing import Any, NamedTuple


class Tokenized(NamedTuple):
    """A prompt with one answer; the first ``n_prompt`` ids are the prompt's."""

    input_ids: list[int]
    n_prompt: int


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Ids of a prompt, with BOS in front where the tokenizer has one and the text has not."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def tokenize(prompt: str, answer: str, tokenizer: Any, max_length: int | None = None) -> Tokenized:
    """Ids of ``prompt + answer`` between BOS and EOS, as TRL's ``CPOTrainer`` makes them.

    Args:
        prompt: text.
        answer: text.
        tokenizer: the model's tokenizer.
        max_length: cuts the end of the answer, never the prompt: a prompt of this length leaves
            nothing of the answer.

    Raises:
        TypeError: for messages instead of text.
    """
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise TypeError(
            f"Expected text, got {type(prompt).__name__} and {type(answer).__name__}. Turn "
            "messages into text first, with the tokenizer's `apply_chat_template`."
        )
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    # Where the prompt's last token merges with the answer's first, it counts as the answer's.
    n_prompt = len(alone) if alone == ids[: len(alone)] else len(alone) - 1
    said, ids = ids[n_prompt:], ids[:n_prompt]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if eos is not None and said[-1:] != [eos]:
        said = [*said, eos]
    room = len(said) if max_length is None else max(0, max_length - len(ids))
    return Tokenized(ids + said[:room], len(ids))
