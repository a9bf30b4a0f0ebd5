"""Prompts and answers as token ids, in the way of TRL's preference trainers."""

from __future__ import annotations

from typing import Any, NamedTuple


class Tokenized(NamedTuple):
    """A prompt with one answer; the first ``n_prompt`` ids are the prompt's."""

    input_ids: list[int]
    n_prompt: int

    def cut(self, max_length: int | None) -> Tokenized:
        """With the end of the answer cut off, never the prompt; None cuts nothing."""
        if max_length is None:
            return self
        return Tokenized(self.input_ids[: max(max_length, self.n_prompt)], self.n_prompt)


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that are no text and never count: BOS, EOS, padding, marks of a chat.

    Tokens that chat templates use need not be among ``all_special_ids``; they are flagged where
    they were added to the vocabulary.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    flagged = {index for index, token in added.items() if token.special}
    return sorted(flagged.union(tokenizer.all_special_ids))


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Ids of a prompt, with BOS in front where the tokenizer has one and the text has not."""
    return _with_bos(tokenizer(prompt, add_special_tokens=False)["input_ids"], tokenizer)


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
    said, ids = ids[n_prompt:], _with_bos(ids[:n_prompt], tokenizer)
    eos = tokenizer.eos_token_id
    if eos is not None and said[-1:] != [eos]:
        said = [*said, eos]
    return Tokenized(ids + said, len(ids)).cut(max_length)


def _with_bos(ids: list[int], tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
