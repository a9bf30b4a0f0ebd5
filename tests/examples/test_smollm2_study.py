"""Pairs in one row each: the same figures as one answer at a time."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import load_example

ROWS = [
    {"prompt": "what is", "chosen": " a b c", "rejected": " d"},
    {"prompt": "and now to", "chosen": " e", "rejected": " f g h i"},
]


class Words:
    """A tokenizer that knows a letter as a token."""

    eos_token_id, bos_token_id = 1, None

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(letter) % 60 for letter in text]}


@pytest.fixture(scope="module")
def study() -> ModuleType:
    load_example("smollm2")
    return load_example("smollm2_study")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=4, **sizes)
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def one_answer(model: Any, prompt: str, answer: str) -> float:
    ask = Words()
    start, rest = ask(prompt)["input_ids"], [*ask(answer)["input_ids"], Words.eos_token_id]
    logps = model(torch.tensor([start + rest])).logits[0].log_softmax(-1)
    picked = [logps[len(start) + k - 1, token] for k, token in enumerate(rest)]
    return float(sum(picked) / len(picked))


@pytest.mark.parametrize("layer", [0, 2])
def test_packed_pairs_score_as_single_answers(study: ModuleType, model: Any, layer: int) -> None:
    packed = study.pack(ROWS, Words())
    packed.bias = packed.bias.double()
    stack = list(model.model.layers)
    with torch.no_grad(), study.without_lower_layers(model, layer, [packed]):
        found = study.mean_logps(model, packed)
        margin = study.losses(model, packed)[1]
    for side, name in enumerate(("chosen", "rejected")):
        for n, row in enumerate(ROWS):
            # The mean is taken in float32.
            assert float(found[side, n]) == pytest.approx(
                one_answer(model, row["prompt"], row[name]), rel=1e-5
            )
    assert torch.allclose(margin, study.BETA * (found[0] - found[1]))
    # The layers are back in their places.
    assert list(model.model.layers) == stack


def test_lower_layers_run_once(study: ModuleType, model: Any) -> None:
    packed, calls = study.pack(ROWS, Words()), []
    packed.bias = packed.bias.double()
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), study.without_lower_layers(model, 1, [packed]):
        for _ in range(3):
            study.mean_logps(model, packed)
    handle.remove()
    assert len(calls) == 1


def test_gini_by_hand(study: ModuleType) -> None:
    assert study.gini(torch.ones(5)) == pytest.approx(0.0)
    assert study.gini(torch.tensor([0.0, 0.0, 0.0, 1.0])) == pytest.approx(0.75)


def test_features_enter_where_the_loss_pulls(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    gain = torch.nn.Parameter(torch.zeros(5))
    slopes = torch.tensor([0.1, -3.0, 2.0, 0.5, -1.0])
    layer = SimpleNamespace(fsrl_adapter={"default": SimpleNamespace(gain=gain)})
    monkeypatch.setattr(study, "fsrl_layers", lambda _: {"layer": layer})
    monkeypatch.setattr(study, "losses", lambda *_: ((gain * slopes).sum()[None], None))
    world = SimpleNamespace(model=None)
    grown = study.Grown(world, None, study.Growth(first=2, more=1), [None, None])
    assert grown.inside.tolist() == [0, 1, 1, 0, 0]

    def update(values: list[float], step: int) -> list[float]:
        (gain * slopes).sum().backward()
        gain.data.copy_(torch.tensor(values))
        grown(step, 40)
        return gain.tolist()

    assert update([1.0] * 5, 1) == [0, 1, 1, 0, 0]
    # Feature 2 is not used and leaves, feature 4 enters: it has the next largest slope.
    assert update([1.0, 1.0, 0.001, 1.0, 0.0], study.EVERY) == [0, 1, 0, 0, 0]
    assert grown.inside.tolist() == [0, 1, 0, 0, 1]
    # Nothing enters in the second half.
    update([1.0, 1.0, 0.0, 0.0, 1.0], 3 * study.EVERY)
    assert grown.inside.tolist() == [0, 1, 0, 0, 1]
