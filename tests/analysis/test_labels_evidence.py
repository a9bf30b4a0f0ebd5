"""Evidence about features against loops over every token, and on the organism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import AddedToken
from transformers import PreTrainedModel

from helpers import (
    D_SAE,
    fsrl_model,
    tiny_model,
    tiny_preferences,
    tiny_sae,
    tiny_tokenizer,
)
from peft_fsrl import FSRLConfig
from peft_fsrl.analysis.composition import count_features
from peft_fsrl.analysis.labels import collect_evidence, collect_held_out, is_held_out
from peft_fsrl.analysis.session import Session
from peft_fsrl.organism import load
from peft_fsrl.training.tokens import tokenize

ROWS = tiny_preferences(24)
SPECIAL = {0, 1, 2}


def session(model: PeftModel, **settings: Any) -> Session:
    return Session(model, tiny_tokenizer(), **{"dataset": ROWS, **settings})


def lively_model() -> PreTrainedModel:
    """A model whose hidden states differ so much between tokens that features come and go."""
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight *= 50
    return model


def naive_acts(row: dict[str, Any], architecture: str = "standard") -> tuple[list[int], Any]:
    """Ids of a text and the base model's feature activations: no padding, no adapter."""
    ids = tokenize(row["prompt"], row["chosen"], tiny_tokenizer()).input_ids
    with torch.no_grad():
        states = lively_model()(torch.tensor([ids]), output_hidden_states=True).hidden_states
        acts = tiny_sae(architecture).encode(states[2])[0]
    return ids, acts


def words(ids: list[int]) -> str:
    return tiny_tokenizer().decode(ids)


@pytest.mark.parametrize("architecture", ["standard", "topk", "abstopk"])
def test_contexts_and_density_against_loops(architecture: str) -> None:
    model = fsrl_model(lively_model(), sae=tiny_sae(architecture))
    features, window = [7, 2, 11, 0, 23], 5
    session = Session(model, tiny_tokenizer(), ROWS, batch_size=5)
    found = collect_evidence(session, features, n_contexts=3, window=window, held_out=0.3)
    assert [evidence.feature for evidence in found] == features
    rows = [row for row in ROWS if not is_held_out(row, 0.3)]
    assert 0 < len(rows) < len(ROWS)
    texts = [naive_acts(row, architecture) for row in rows]
    for evidence in found:
        peaks, active, counted = [], 0, 0
        for ids, acts in texts:
            values = [
                0.0 if token in SPECIAL else float(acts[i, evidence.feature])
                for i, token in enumerate(ids)
            ]
            active += sum(value != 0 for value in values)
            counted += sum(token not in SPECIAL for token in ids)
            place = max(range(len(ids)), key=lambda i: abs(values[i]))
            if values[place]:
                start = min(max(place - 3, 0), max(0, len(ids) - window))
                peaks.append((abs(values[place]), ids, values, start))
        peaks.sort(key=lambda peak: -peak[0])
        assert evidence.density == pytest.approx(active / counted)
        assert len(evidence.contexts) == min(3, len(peaks))
        for context, (_, ids, values, start) in zip(evidence.contexts, peaks, strict=False):
            assert "".join(context.tokens) == words(ids[start : start + window])
            assert context.activations == pytest.approx(values[start : start + window], abs=1e-4)
    assert sum(len(evidence.contexts) == 3 for evidence in found) > 2


def test_all_features_by_default_and_the_model_as_before() -> None:
    model = fsrl_model().train()
    before = model(torch.tensor([[1, 5, 6]])).logits
    found = collect_evidence(Session(model, tiny_tokenizer(), ROWS, batch_size=7))
    assert [evidence.feature for evidence in found] == list(range(D_SAE))
    assert model.training
    assert torch.equal(model(torch.tensor([[1, 5, 6]])).logits, before)
    stream = Session(model, tiny_tokenizer(), iter(ROWS), batch_size=24)
    some = collect_evidence(stream, [5])
    assert some[0].density == found[5].density
    assert [c.tokens for c in some[0].contexts] == [c.tokens for c in found[5].contexts]


@pytest.mark.parametrize("tied", [False, True])
def test_promoted_tokens_are_those_of_the_logit_lens(tied: bool) -> None:
    base = tiny_model("gpt2" if tied else "llama")
    [evidence] = collect_evidence(session(fsrl_model(base)), [4], n_tokens=5)
    weights = base.transformer.wte.weight if tied else base.lm_head.weight
    logits = weights.double() @ tiny_sae().W_dec[4].double()
    order = [i for i in logits.argsort(descending=True).tolist() if i not in SPECIAL]
    names = [f"w{i}" for i in order]
    assert [token.strip() for token in evidence.promoted] == names[:5]
    assert [token.strip() for token in evidence.suppressed] == names[::-1][:5]
    assert evidence.promoted[0].startswith(" ")


def test_rows_of_the_vocabulary_without_a_token_are_not_promoted() -> None:
    base = tiny_model()
    base.resize_token_embeddings(64)
    with torch.no_grad():
        base.lm_head.weight[40:] = 100 * tiny_sae().W_dec[4]
    [evidence] = collect_evidence(session(fsrl_model(base)), [4], n_tokens=99)
    assert len(evidence.promoted) == len(set(evidence.promoted)) == 40 - len(SPECIAL)


def test_held_out_contexts() -> None:
    model, window = fsrl_model(lively_model()), 4

    def again(seed: int) -> Any:
        return collect_held_out(
            session(model, seed=seed), [3, 9], n_contexts=4, window=window, held_out=0.5
        )

    held = again(1)
    texts: dict[str, tuple[list[int], Any]] = {}
    for row in ROWS:
        if is_held_out(row, 0.5):
            ids, acts = naive_acts(row)
            for start in range(max(1, len(ids) - window + 1)):
                texts[words(ids[start : start + window])] = (ids, acts)
    for contexts in held:
        assert contexts.active or contexts.inactive
        for context in contexts.active:
            assert "".join(context.tokens) in texts
            assert any(context.activations)
        for context in contexts.inactive:
            assert "".join(context.tokens) in texts
            assert not any(context.activations)
    assert any(contexts.active and contexts.inactive for contexts in held)
    assert again(1) == held
    assert again(2) != held
    evidence = collect_evidence(session(model), [3, 9], window=99, n_contexts=99, held_out=0.5)
    used = {"".join(c.tokens) for e in evidence for c in e.contexts}
    assert used
    assert not any(
        "".join(c.tokens) in text for h in held for c in (*h.active, *h.inactive) for text in used
    )


def test_silent_windows_are_drawn_from_all_there_are() -> None:
    """A feature that is active once in a text leaves windows before and after it."""
    rows = Dataset.from_list([{"prompt": "", "chosen": " ".join(f"w{i}" for i in range(3, 33))}])
    model = fsrl_model(lively_model(), sae=tiny_sae("topk", k=1))
    seen: dict[int, set[str]] = {}
    for seed in range(30):
        texts = session(model, dataset=rows, seed=seed)
        for held in collect_held_out(texts, n_contexts=1, window=3, held_out=1.0):
            for context in held.inactive:
                seen.setdefault(held.feature, set()).add(context.tokens[-1])
    assert len(seen) > D_SAE // 2
    assert all(len(ends) > 3 for ends in seen.values())


def test_the_share_held_out() -> None:
    rows = [{"prompt": f"p{i}", "chosen": "c"} for i in range(2000)]
    held = [is_held_out(row, 0.25) for row in rows]
    assert 0.2 < sum(held) / len(held) < 0.3
    assert not any(is_held_out(row, 0.0) for row in rows)
    assert all(is_held_out(row, 1.0) for row in rows)
    # What is held out stays held out when the share grows.
    assert all(is_held_out(row, 0.5) for row, out in zip(rows, held, strict=True) if out)


def test_rows_without_a_prompt() -> None:
    rows = [{"text": row["chosen"]} for row in ROWS]
    [evidence] = collect_evidence(session(fsrl_model(), dataset=rows), [3], answer="text")
    assert evidence.contexts


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"features": [D_SAE]}, IndexError, "Feature 24 does not exist"),
        ({"n_contexts": 0}, ValueError, "numbers of 1 or more, got {'n_contexts': 0}"),
        ({"held_out": 1.0}, ValueError, "`held_out` leaves nothing"),
    ],
)
def test_errors(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        collect_evidence(session(fsrl_model()), **{"features": [1], **settings})


def test_the_tokens_of_a_chat_template_do_not_count() -> None:
    """Those that were added to the vocabulary and flagged, though no attribute names them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.add_tokens(AddedToken("<|mark|>", special=True))
    base = lively_model()
    base.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        # What a turn looks like is what this feature detects.
        base.get_input_embeddings().weight[-2:] = 100 * tiny_sae().W_enc[:, 4]
        base.lm_head.weight[-2:] = 100 * tiny_sae().W_dec[4]
    marked = [{"prompt": "<|mark|> w5 <|turn|>", "chosen": "w7 <|mark|> w8"}]
    session = Session(fsrl_model(base), tokenizer, marked)
    [evidence] = collect_evidence(session, [4], held_out=0.0, n_tokens=99)
    for context in evidence.contexts:
        for token, activation in zip(context.tokens, context.activations, strict=True):
            assert not activation or "<" not in token
    assert {len(evidence.promoted), len(evidence.suppressed)} == {40 - len(SPECIAL)}
    # Three tokens count, however many marks stand between them.
    assert evidence.density in {0, 1 / 3, 2 / 3, 1}
    usage = count_features(Session(session.model, tokenizer, marked), segments=["prompt_chosen"])
    assert usage["prompt_chosen"].n_tokens == 3


def test_conversations_are_texts_too() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in ROWS
    ]
    model = fsrl_model()
    found = collect_evidence(Session(model, tokenizer, messages), [3, 5])
    assert all(evidence.contexts for evidence in found)


def test_a_layer_without_an_active_adapter() -> None:
    model = fsrl_model()
    model.base_model.set_adapter([])
    with pytest.raises(ValueError, match=r"None of the adapters \['default'\] is active"):
        collect_evidence(session(model), [1])


def test_what_is_trained_beside_the_adapter() -> None:
    beside = fsrl_model(lively_model(), modules_to_save=["embed_tokens"])
    with torch.no_grad():
        for name, parameter in beside.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(100.0)
    plain = collect_evidence(session(fsrl_model(lively_model())), [3, 9])
    assert collect_evidence(session(beside), [3, 9]) == plain


def test_a_disabled_adapter_sees_nothing() -> None:
    model = fsrl_model()
    with model.disable_adapter(), pytest.raises(ValueError, match="None of the adapters"):
        collect_evidence(session(model), [1])


def test_two_layers_are_too_many() -> None:
    model = fsrl_model(layer=[0, 1], sae={0: tiny_sae(metadata={}), 1: tiny_sae(seed=1)})
    with pytest.raises(ValueError, match="Expected one FSRL layer, found"):
        collect_evidence(session(model), [1])


@pytest.fixture(scope="module")
def organism_model() -> PeftModel:
    organism = load()
    config = FSRLConfig(layer=organism.layer, sae=str(organism.sae_path), task_type="CAUSAL_LM")
    return get_peft_model(organism.load_model(), config)


def test_evidence_of_style_features_shows_style(organism_model: PeftModel) -> None:
    organism = load()
    style = organism.features("style")
    pairs = Session(organism_model, organism.load_tokenizer(), organism.preferences(150))
    found = collect_evidence(pairs, style, n_contexts=6)
    markdown, plain = {"##", "###", "-", "*"}, {"well", "okay", "and", "then"}
    labels = {label.index: label for label in organism.feature_labels}
    checked = 0
    for evidence in found:
        auroc = labels[evidence.feature].auroc["style"]
        if abs(auroc - 0.5) < 0.44:
            continue
        liked, other = (markdown, plain) if auroc > 0.5 else (plain, markdown)
        said = [{token.strip() for token in context.tokens} for context in evidence.contexts]
        assert all(words & liked and not words & other for words in said)
        checked += 1
    assert checked >= 4
