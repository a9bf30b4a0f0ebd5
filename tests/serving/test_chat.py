"""A conversation shows what `generate` says, and the feature behind each piece."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import get_peft_model

from helpers import fsrl_model, only_layer, randomize_adapter, tiny_tokenizer
from peft_fsrl import FSRLConfig, observe, organism
from peft_fsrl.analysis.generations import SteeredToken
from peft_fsrl.analysis.labels import FeatureLabel, Labels
from peft_fsrl.cli.main import main
from peft_fsrl.serving.chat import Chat

LABELS = Labels(
    "test", ("style",), 24, None, tuple(FeatureLabel(i, None, ("style",), None) for i in range(8))
)


def said(model: Any, ids: torch.Tensor) -> tuple[list[int], list[list[tuple[int, float]]]]:
    """Greedy tokens by whole forward passes, and the two strongest features before each."""
    strongest, tokens = [], ids[0].tolist()
    for _ in range(6):
        seen: list[torch.Tensor] = []
        with torch.no_grad(), observe(model, lambda e, seen=seen: seen.append(e.steering_vector)):
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        v = seen[0][0, -1].tolist()
        order = sorted(range(len(v)), key=lambda i: -abs(v[i]))[:2]
        strongest.append([(i, pytest.approx(v[i], rel=1e-4)) for i in order if v[i]])
        tokens.append(int(logits.argmax()))
    return tokens[ids.shape[1] :], strongest


def pairs(piece: SteeredToken) -> list[tuple[int, float]]:
    return [(each.feature, each.value) for each in piece.steered]


def test_pieces_come_with_the_features_behind_them() -> None:
    model, tokenizer = fsrl_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    chat = Chat(model, tokenizer, LABELS, max_new_tokens=6, n_features=2)
    pieces: list[SteeredToken] = []
    answer = chat.say("w5 w7", pieces.append)
    tokens, strongest = said(model, torch.tensor([[5, 7]]))
    assert answer == tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer == "".join(piece.text for piece in pieces)
    shown = [s for token, s in zip(tokens, strongest, strict=True) if token > 2]
    assert [pairs(piece) for piece in pieces] == shown
    assert any(len(each) == 2 for each in shown)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_commands_change_how_answers_are_steered() -> None:
    model = fsrl_model()
    chat = Chat(model, tiny_tokenizer(), LABELS, max_new_tokens=4)
    assert chat.command("/strength 0.5") == "strength 0.5, without features: none"
    assert chat.command("/ablate style,20").endswith("0, 1, 2, 3, 4, 5, 6, 7, 20")
    assert (chat.asked.strength, chat.asked.ablated) == (0.5, (*range(8), 20))
    assert chat.command("/base").startswith("strength 0,")
    pieces: list[SteeredToken] = []
    answer = chat.say("w5", pieces.append)
    with model.disable_adapter():
        base = model.generate(torch.tensor([[5]]), max_new_tokens=4, do_sample=False)
    assert answer == tiny_tokenizer().decode(base[0, 1:], skip_special_tokens=True)
    assert not any(piece.steered or piece.n_steered for piece in pieces)
    assert chat.command("/base").startswith("strength 0.5,")
    assert chat.command("/ablate").endswith("none")
    chat.command("/reset")
    assert chat.messages == []
    before = chat.asked
    for line in ("/strength much", "/strength nan", "/ablate 24", "/ablate tone", "/shout"):
        with pytest.raises(ValueError, match=r"fsrl_|no command"):
            chat.command(line)
    assert chat.asked == before


def test_the_steering_of_a_category_has_a_factor_of_its_own() -> None:
    model = fsrl_model()
    chat = Chat(model, tiny_tokenizer(), LABELS, max_new_tokens=1, n_features=24)
    seen: list[SteeredToken] = []
    for chat.scales in ({}, {"style": -2.0}):
        chat.messages.clear()
        chat.say("w5 w7", seen.append)
    before, after = (dict(pairs(piece)) for piece in seen)
    assert set(before) & set(range(8))
    assert set(before) - set(range(8))
    expected = {i: v * -2 if i < 8 else v for i, v in before.items()}
    assert after == pytest.approx(expected)


def test_labels_of_another_sae_are_refused() -> None:
    with pytest.raises(ValueError, match="an SAE with 23 features"):
        Chat(fsrl_model(), tiny_tokenizer(), replace(LABELS, d_sae=23))


def test_chat_in_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    creature = organism.load()
    config = FSRLConfig(layer=creature.layer, sae=str(creature.sae_path), task_type="CAUSAL_LM")
    model = get_peft_model(creature.load_model(), config)
    randomize_adapter(only_layer(model))
    model.save_pretrained(str(tmp_path))
    prompt = organism.preferences(1, seed=1)[0]["prompt"]
    lines = f"{prompt}\n/strength nan\n/strength 0\n{prompt}\n/quit\n"
    with patch("sys.stdin", io.StringIO(lines)):
        options = ["--labels", "organism", "--max-new-tokens", "6", "--device", "cpu"]
        assert main(["chat", str(tmp_path), "--base-model", "organism", *options]) == 0
    steered, unsteered = [part for part in capsys.readouterr().out.split("> ") if part][1::3]
    assert re.search(r"\[\d+ (style |honesty |\w+ )?[+-]\d\.\d\d\]", steered)
    assert "[" not in unsteered
