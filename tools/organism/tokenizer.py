"""A word-level tokenizer for the world, as real tokenizer files with a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_fsrl.organism.lexicon import ASSISTANT, BOS, EOS, PAD, UNK, USER
from peft_fsrl.organism.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} <user> {{ message['content'] }} <assistant>"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles exist in this world') }}"
    "{% endif %}{% endfor %}"
)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token per word, BOS in front, no EOS, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(world.vocabulary())}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, vocabulary[BOS])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        # Role marks are structure, not content: decoding with skip_special_tokens drops them.
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=128,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
