"""Sampled answers against a plain model steered by the formula, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import helpers
from peft_fsrl.analysis import (
    Coherence,
    Generation,
    Session,
    VariantCoherence,
    compare_coherence,
    compare_generations,
    compute_coherence,
    render_coherence,
    render_generations,
    render_steered_tokens,
)
from peft_fsrl.analysis.generations import token_texts
from peft_fsrl.steering import ablate_features, scale_steering

PROMPTS = ["w3 w4", "w9 w10 w11 w12"]
CATEGORIES = {"style": [2, 5, 7, 8, 11, 12, 13, 19], "honesty": [1, 4, 6, 9, 14, 20, 23]}


def decided(family: str = "llama") -> Any:
    """A tiny model whose next token depends on what it read, and so on steering."""
    model = helpers.tiny_model(family, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    return model


@pytest.fixture
def model() -> PeftModel:
    return helpers.fsrl_model(decided())


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def sampled(model: Any, prompt: str, seed: int, n: int = 8) -> list[int]:
    """What ``generate`` alone gives after a seed, up to the end."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = torch.tensor([[1, *ids_of(prompt)]])
        output = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=n
        )
    said = output[0, start.shape[1] :].tolist()
    return said[: said.index(2)] if 2 in said else said


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2"])
def test_tokens_and_features_equal_the_formula(family: str) -> None:
    model = helpers.fsrl_model(decided(family))
    layer, sae = helpers.only_layer(model), helpers.tiny_sae()
    found = compare_generations(
        Session(model, helpers.tiny_tokenizer(), seed=5), PROMPTS, max_new_tokens=8, n_features=4
    )
    plain, strongest = decided(family), set()
    for number, (generation, prompt) in enumerate(zip(found, PROMPTS, strict=True)):
        assert generation.prompt == prompt
        assert [each.name for each in generation.continuations] == ["base", "trained"]
        assert ids_of(generation.text("base")) == sampled(plain, prompt, 5 + number)
        assert not any(token.n_steered for token in generation.continuations[0].tokens)
        with helpers.naively_steered(plain, layer, sae) as passes:
            said = sampled(plain, prompt, 5 + number)
            passes.clear()
            with torch.no_grad():
                plain(torch.tensor([[1, *ids_of(prompt), *said]]))
        [(_, vectors, _)] = passes
        trained = generation.continuations[1]
        assert ids_of(trained.text) == said
        assert trained.n_tokens == len(trained.tokens) == len(said)
        for place, token in enumerate(trained.tokens):
            v = vectors[0, len(ids_of(prompt)) + place]
            order = sorted(range(len(v)), key=lambda i: -abs(float(v[i])))[:4]
            assert [each.feature for each in token.steered] == order
            assert [each.value for each in token.steered] == pytest.approx(
                [float(v[i]) for i in order], rel=1e-4
            )
            assert token.n_steered == int((v != 0).sum())
            strongest.add(token.steered[0].value)
    assert len(strongest) > 8
    assert found[0].text("base") != found[0].text("trained")


def test_variants_are_what_their_names_say(model: PeftModel) -> None:
    tokenizer = helpers.tiny_tokenizer()
    settings: Any = {"max_new_tokens": 12, "n_features": helpers.D_SAE}
    session = Session(model, tokenizer, seed=3)
    [found] = compare_generations(session, PROMPTS[:1], without=CATEGORIES, **settings)
    assert [each.name for each in found.continuations] == [
        "base",
        "trained",
        "without style",
        "without honesty",
    ]
    for name, features in CATEGORIES.items():
        with ablate_features(model, features):
            [ablated] = compare_generations(session, PROMPTS[:1], **settings)
        [answer] = [each for each in found.continuations if each.name == f"without {name}"]
        assert answer.tokens == ablated.continuations[1].tokens
        steered = {each.feature for token in answer.tokens for each in token.steered}
        assert steered
        assert not steered & set(features)
    trained = found.continuations[1]
    steered = {each.feature for token in trained.tokens for each in token.steered}
    assert steered & set(CATEGORIES["style"])
    assert steered & set(CATEGORIES["honesty"])
    assert len({answer.text for answer in found.continuations}) == 4
    assert Generation.from_json(found.to_json()) == found


def test_same_seed_same_texts_and_nothing_is_disturbed(model: PeftModel) -> None:
    tokenizer = helpers.tiny_tokenizer()
    model.train()
    before = torch.random.get_rng_state()
    first = compare_generations(Session(model, tokenizer, seed=5), PROMPTS, max_new_tokens=8)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    assert not helpers.only_layer(model).observers
    assert not helpers.only_layer(model).edits
    assert (
        compare_generations(Session(model, tokenizer, seed=5), PROMPTS, max_new_tokens=8) == first
    )
    assert (
        compare_generations(Session(model, tokenizer, seed=6), PROMPTS[1:], max_new_tokens=8)
        == first[1:]
    )
    assert (
        compare_generations(Session(model, tokenizer, seed=6), PROMPTS, max_new_tokens=8) != first
    )
    with scale_steering(model, 0.0):
        unsteered = compare_generations(
            Session(model, tokenizer, seed=5), PROMPTS, max_new_tokens=8
        )
    assert [each.text("trained") for each in unsteered] == [each.text("base") for each in first]


def test_greedy_answers_ignore_the_seed_and_the_models_own_settings(model: PeftModel) -> None:
    tokenizer = helpers.tiny_tokenizer()
    model.generation_config.num_beams = 3
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    first = compare_generations(Session(model, tokenizer, seed=1), ["w3"], **settings)
    assert compare_generations(Session(model, tokenizer, seed=2), ["w3"], **settings) == first
    ids = [1, 3]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(decided()(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids_of(first[0].text("base")) == ids[2:]


def test_an_answer_that_ends_at_once_has_no_tokens(model: PeftModel) -> None:
    model.generation_config.eos_token_id = list(range(helpers.VOCABULARY))
    [found] = compare_generations(
        Session(model, helpers.tiny_tokenizer()), ["w3"], without={"style": [2]}
    )
    for answer in found.continuations:
        assert (answer.text, answer.tokens, answer.n_tokens) == ("", (), 0)
    assert "(nothing)" in render_generations([found])
    assert render_steered_tokens(found.continuations[1]) == ""


def test_an_end_later_on_is_no_token_of_the_answer(model: PeftModel) -> None:
    model.generation_config.eos_token_id = list(range(20))
    found = compare_generations(
        Session(model, helpers.tiny_tokenizer()), PROMPTS, max_new_tokens=20
    )
    lengths = [answer.n_tokens for each in found for answer in each.continuations]
    assert 0 < max(lengths) < 20, "the test needs answers that end"
    for each in found:
        for answer in each.continuations:
            assert answer.n_tokens == len(ids_of(answer.text)) == len(answer.tokens)
            assert min([*ids_of(answer.text), 20]) >= 20


def test_no_prompt_and_a_prompt_of_nothing(model: PeftModel) -> None:
    tokenizer = helpers.tiny_tokenizer()
    assert compare_generations(Session(model, tokenizer), []) == ()
    assert compare_generations(Session(model, tokenizer), [""], max_new_tokens=2)[0].prompt == ""
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="The prompt '' has no tokens, and no BOS"):
        compare_generations(Session(model, tokenizer), [""])


def test_a_disabled_adapter_steers_no_token(model: PeftModel) -> None:
    with model.disable_adapter():
        [found] = compare_generations(
            Session(model, helpers.tiny_tokenizer()), ["w3"], max_new_tokens=4
        )
    assert found.text("base") == found.text("trained")
    assert [token.n_steered for token in found.continuations[1].tokens] == [0] * 4


def test_features_keep_their_names_in_a_restricted_adapter() -> None:
    model = helpers.fsrl_model(decided(), features=[3, 9, 17])
    [found] = compare_generations(
        Session(model, helpers.tiny_tokenizer()), ["w3"], max_new_tokens=12
    )
    steered = {each.feature for token in found.continuations[1].tokens for each in token.steered}
    assert steered
    assert steered <= {3, 9, 17}


def test_one_of_several_layers_has_to_be_named() -> None:
    saes = {0: helpers.tiny_sae(metadata={}), 2: helpers.tiny_sae(metadata={}, seed=1)}
    model = helpers.fsrl_model(decided(), sae=saes, layer=[0, 2])
    tokenizer = helpers.tiny_tokenizer()
    names = ["model.layers.0", "model.layers.2"]
    with pytest.raises(ValueError, match=r"Expected one FSRL layer.*layers\.2.*`layer_name`"):
        compare_generations(Session(model, tokenizer), ["w3"])
    with pytest.raises(ValueError, match=r"No FSRL adapter wraps 'layers\.2'"):
        compare_generations(Session(model, tokenizer), ["w3"], layer_name="layers.2")
    found = [
        compare_generations(
            Session(model, tokenizer), ["w3"], max_new_tokens=6, without=CATEGORIES, layer_name=name
        )[0]
        for name in names
    ]
    assert found[0].text("trained") == found[1].text("trained")
    assert found[0].continuations[1].tokens != found[1].continuations[1].tokens
    with ablate_features(model, CATEGORIES["style"], names[0]):
        [one] = compare_generations(
            Session(model, tokenizer), ["w3"], max_new_tokens=6, layer_name=names[0]
        )
    assert one.continuations[1].tokens == found[0].continuations[2].tokens


def test_mistakes_are_found_before_anything_is_sampled(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was sampled")

    monkeypatch.setattr(type(model), "generate", never)
    with pytest.raises(IndexError, match="24"):
        compare_generations(
            Session(model, helpers.tiny_tokenizer()), ["w3"], without={"style": [24]}
        )


def test_decoding_of_several_tokens_a_pass_is_refused(model: PeftModel) -> None:
    model.generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(ValueError, match=r"give one token each.*prompt lookup"):
        compare_generations(
            Session(model, helpers.tiny_tokenizer()), ["w3 w4 w3 w4 w3 w4"], max_new_tokens=8
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as byte-level BPE writes what it has not merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_bytes_of_one_character_stay_together() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé 漢🙂!")["input_ids"]
    assert len(ids) == 1 + 2 + 1 + 3 + 4 + 1
    expected = ["a", "", "é", " ", "", "", "漢", "", "", "", "🙂", "!"]
    assert token_texts(ids, tokenizer) == expected
    for n in range(len(ids) + 1):
        cut = token_texts(ids[:n], tokenizer)
        assert len(cut) == n
        assert "".join(cut) == tokenizer.decode(ids[:n])
    half = ids[:2]
    assert token_texts([*half, tokenizer.eos_token_id, *half], tokenizer)[0] == "a"


def test_texts_join_where_the_decoder_takes_back_what_it_said() -> None:
    words = {"I": 0, "do": 1, "n't": 2, "care": 3, ".": 4, "<end>": 5}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<end>")),
        eos_token="<end>",
        clean_up_tokenization_spaces=True,
    )
    ids = [0, 1, 2, 5, 3, 4]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert whole == "I don't care."
    assert token_texts(ids, tokenizer) == ["I", " do", "n't", "", " care", "."]
    assert token_texts([], tokenizer) == []


def test_coherence_of_every_variant(model: PeftModel) -> None:
    tokenizer = helpers.tiny_tokenizer()
    settings: dict[str, Any] = {"max_new_tokens": 8, "seed": 2, "batch_size": 2}
    found = compare_coherence(model, PROMPTS * 2, tokenizer, without=CATEGORIES, **settings)
    names = [each.name for each in found]
    assert names == ["base", "trained", "without style", "without honesty"]
    inputs = (model, PROMPTS * 2, tokenizer)
    assert found[0].coherence == compute_coherence(*inputs, steered=False, **settings)
    assert found[1].coherence == compute_coherence(*inputs, **settings)
    with ablate_features(model, CATEGORIES["style"]):
        assert found[2].coherence == compute_coherence(*inputs, **settings)
    assert len({each.coherence.perplexity for each in found}) == 4
    with pytest.raises(ValueError, match="at least one prompt"):
        compare_coherence(model, [], tokenizer)


def test_text_for_a_terminal(model: PeftModel) -> None:
    found = compare_generations(
        Session(model, helpers.tiny_tokenizer()), PROMPTS, without=CATEGORIES, max_new_tokens=40
    )
    text = render_generations(found)
    assert max(map(len, text.splitlines())) < 100
    for answer in found[1].continuations:
        assert f"{answer.name:15} {answer.n_tokens:4d}  {answer.text.split()[0]}" in text
    trained = found[0].continuations[1]
    lines = render_steered_tokens(trained, {2: "style"}, n_features=2).splitlines()
    assert len(lines) == trained.n_tokens
    for line, token in zip(lines, trained.tokens, strict=True):
        assert line.startswith(repr(token.text))
        for each in token.steered[:2]:
            label = " (style)" if each.feature == 2 else ""
            assert f"{each.feature}{label} {each.value:+.3f}" in line
        if token.n_steered > 2:
            assert line.endswith(f" and {token.n_steered - 2} more")
    figures = ["base", "7", "2.50", "12.5%", "0.250", "0.750", "11.0", "50.0%"]
    table = render_coherence(
        [VariantCoherence("base", Coherence(7, 2.5, 0.125, 0.25, 0.75, 11.0, 0.5))]
    )
    assert table.splitlines()[1].split() == figures
