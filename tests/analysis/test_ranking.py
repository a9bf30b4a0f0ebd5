"""The first-order effect of steering against finite differences and a graph of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from torch import Tensor, nn

from helpers import FAMILIES, LAYERS, tiny_model, tiny_preferences, tiny_sae, tiny_tokenizer
from peft_fsrl.analysis import LayerEffect, Session, probe_layers, rank_layers, statistics

BETA, GAMMA = 4.0, 1.3
PAIRS = 3
NORMALISED = [
    ("standard", "none"),
    ("standard", "layer_norm"),
    ("jumprelu", "constant_norm_rescale"),
    ("topk", "expected_average_only_in"),
]


def sae_of(layer: int, architecture: str = "standard", normalization: str = "none") -> SAE[Any]:
    metadata = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    return tiny_sae(architecture, normalization, seed=layer, dtype="float64", metadata=metadata)


@contextmanager
def adding(module: nn.Module, sae: SAE[Any], steer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add ``decode(steer(x)) - decode(0)``, by SAELens itself, to what a module puts out."""

    def hook(_: nn.Module, inputs: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        # Encoding is what sets the run-time normalization that decoding undoes.
        acts = sae.encode(x.detach())
        moved = sae.decode(steer(x))
        sae.encode(x.detach())
        x = x + moved - sae.decode(torch.zeros_like(acts))
        return x if isinstance(output, Tensor) else (x, *output[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def naive_loss(model: nn.Module, row: dict[str, str]) -> Tensor:
    """SimPO's loss of one pair, token by token."""
    tokenizer, rewards = tiny_tokenizer(), []
    for side in ("chosen", "rejected"):
        prompt = [1, *tokenizer(row["prompt"])["input_ids"]]
        answer = [*tokenizer(row[side])["input_ids"], 2]
        logits = model(torch.tensor([prompt + answer])).logits[0]
        logps = [
            logits[len(prompt) + t - 1].log_softmax(-1)[token] for t, token in enumerate(answer)
        ]
        rewards.append(BETA * sum(logps) / len(logps))
    return -torch.log(torch.sigmoid(rewards[0] - rewards[1] - GAMMA))


def mean_loss(model: nn.Module, rows: Dataset) -> Tensor:
    return sum(naive_loss(model, row) for row in rows) / len(rows)


def ranked(model: nn.Module, saes: dict[int, Any], **settings: Any) -> dict[int, LayerEffect]:
    found = rank_layers(
        Session(
            model,
            tiny_tokenizer(),
            tiny_preferences(PAIRS),
            beta=BETA,
            gamma=GAMMA,
            **{"batch_size": 2, **settings},
        ),
        saes,
        n_features=24,
    )
    return {effect.layer: effect for effect in found}


@pytest.mark.parametrize(("architecture", "normalization"), NORMALISED)
def test_slopes_are_finite_differences(architecture: str, normalization: str) -> None:
    # Not a Llama, whose norms compute in float32 whatever the dtype.
    model, rows, step = tiny_model("gpt2").double(), tiny_preferences(PAIRS), 1e-5
    saes = {layer: sae_of(layer, architecture, normalization) for layer in (0, 2)}
    effects = ranked(model, saes)
    for layer, sae in saes.items():
        slopes = {effect.feature: effect.slope for effect in effects[layer].features}
        assert len(slopes) == 24
        assert effects[layer].constant == max(abs(slope) for slope in slopes.values())
        for feature in (0, 23):
            losses = []
            for sign in (1, -1):

                def steer(x: Tensor, by: float = sign * step, at: int = feature) -> Tensor:
                    v = torch.zeros(*x.shape[:-1], 24, dtype=torch.float64)
                    v[..., at] = by
                    return v

                with torch.no_grad(), adding(model.transformer.h[layer], sae, steer):
                    losses.append(mean_loss(model, rows).item())
            expected = (losses[0] - losses[1]) / (2 * step)
            assert abs(expected) > 1e-4, "the test needs an effect"
            assert slopes[feature] == pytest.approx(expected, rel=1e-6)


def test_errors_are_the_spread_over_pairs() -> None:
    model, saes = tiny_model().double(), {1: sae_of(1)}
    alone = [
        rank_layers(
            Session(model, tiny_tokenizer(), [row], beta=BETA, gamma=GAMMA), saes, n_features=24
        )[0]
        for row in tiny_preferences(PAIRS)
    ]
    for feature, slope, error in map(astuple, ranked(model, saes)[1].features):
        slopes = [e.slope for each in alone for e in each.features if e.feature == feature]
        assert slope == pytest.approx(mean(slopes), rel=1e-9)
        assert error == pytest.approx(stdev(slopes) / PAIRS**0.5, rel=1e-7)
    assert alone[0].features[0].error == 0.0


def test_per_token_takes_the_best_feature_at_every_token() -> None:
    model, sae = tiny_model().double(), sae_of(1)
    total, constant = 0.0, torch.zeros(24, dtype=torch.float64)
    for row in tiny_preferences(PAIRS):
        vectors: list[Tensor] = []

        def steer(x: Tensor, kept: list[Tensor] = vectors) -> Tensor:
            kept.append(torch.zeros(*x.shape[:-1], 24, dtype=torch.float64, requires_grad=True))
            return kept[-1]

        with adding(model.model.layers[1], sae, steer):
            loss = naive_loss(model, row)
        for gradient in torch.autograd.grad(loss, vectors):
            constant += gradient[0].sum(0)
            total += sum(gradient[0, t].abs().max().item() for t in range(gradient.shape[1]))
    effect = ranked(model, {1: sae})[1]
    assert effect.per_token == pytest.approx(total / PAIRS, rel=1e-9)
    assert effect.constant == pytest.approx(constant.abs().max().item() / PAIRS, rel=1e-9)
    assert effect.features[0].feature == int(constant.abs().argmax())
    assert effect.constant < effect.per_token


def test_batching_and_streaming_change_nothing() -> None:
    model, saes = tiny_model().double(), {0: sae_of(0), 1: sae_of(1)}
    together, single = ranked(model, saes, batch_size=3), ranked(model, saes, batch_size=1)
    for layer in saes:
        assert together[layer].n_pairs == single[layer].n_pairs == PAIRS
        assert together[layer].constant == pytest.approx(single[layer].constant, rel=1e-9)
        assert together[layer].per_token == pytest.approx(single[layer].per_token, rel=1e-9)
    stream = tiny_preferences(PAIRS).to_iterable_dataset()
    found = rank_layers(
        Session(model, tiny_tokenizer(), stream, beta=BETA, gamma=GAMMA, batch_size=3),
        saes,
        n_features=24,
    )
    assert {effect.layer: effect for effect in found} == together
    assert found[0].per_token > found[1].per_token


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model = tiny_model(family)
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.train()
    found = rank_layers(
        Session(model, tiny_tokenizer(), tiny_preferences(2)),
        {
            layer: tiny_sae(metadata={"hook_name": f"blocks.{layer}.hook_resid_post"})
            for layer in range(LAYERS)
        },
    )
    assert sorted(effect.layer for effect in found) == list(range(LAYERS))
    assert all(math.isfinite(effect.constant) and effect.constant > 0 for effect in found)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match="at least one preference pair"):
        rank_layers(Session(model, tokenizer, []), {1: tiny_sae()})
    with pytest.raises(ValueError, match="Layer 9 does not exist"):
        rank_layers(Session(model, tokenizer, tiny_preferences(2)), {9: tiny_sae()})
    with pytest.raises(ValueError, match=r"width 8.*hidden size 16"):
        rank_layers(Session(model, tokenizer, tiny_preferences(2)), {1: tiny_sae(d_in=8)})


def last_and_mean(row: dict[str, str], side: str, layer: int) -> tuple[Tensor, Tensor]:
    """What a probe reads of one text: its last token, and the mean of its answer."""
    words = [[int(word[1:]) for word in row[name].split()] for name in ("prompt", side)]
    ids = [1, *words[0], *words[1], 2]
    with torch.no_grad():
        states = tiny_model()(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hidden = states[layer + 1][0].double()
    return hidden[-1], hidden[1 + len(words[0]) :].mean(dim=0)


@pytest.mark.parametrize(("pooling", "place"), [("last", 0), ("mean", 1)])
def test_a_probe_is_a_logistic_regression_on_other_pairs(
    pooling: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny_preferences(10)
    seen: list[tuple[Any, ...]] = []

    def correct(*given: Any) -> list[bool]:
        seen.append(given)
        return [True, False, True, True]

    monkeypatch.setattr(statistics, "probe_correct", correct)
    session = Session(tiny_model(), tiny_tokenizer(), rows, batch_size=3, seed=4)
    probes = probe_layers(session, [1, 0], pooling=pooling)
    assert [(p.layer, p.n_train, p.n_test) for p in probes] == [(1, 8, 2), (0, 8, 2)]
    assert probes[0].accuracy == statistics.mean_interval([0.5, 1.0], seed=4)
    for layer, (train, train_labels, test, test_labels) in zip((1, 0), seen, strict=True):
        everything = {
            (number, side): last_and_mean(row, side, layer)[place]
            for number, row in enumerate(rows)
            for side in ("chosen", "rejected")
        }

        def find(vector: Any, known: dict[Any, Tensor] = everything) -> tuple[int, str]:
            given = torch.as_tensor(vector)
            return min(known, key=lambda key: float((known[key] - given).abs().max()))

        fitted, held_out = [find(x) for x in train], [find(x) for x in test]
        for found, labels in ((fitted, train_labels), (held_out, test_labels)):
            assert [side == "chosen" for _, side in found] == labels
        assert not {number for number, _ in fitted} & {number for number, _ in held_out}
        assert len(set(fitted)) == 16
        assert torch.allclose(torch.as_tensor(test[0]), everything[held_out[0]], atol=1e-5)


def test_a_probe_finds_what_can_be_told_apart() -> None:
    # All chosen answers are of other words than all rejected ones.
    rows = [
        {"prompt": f"w{3 + i}", "chosen": f" w{10 + i % 5} w10", "rejected": f" w{20 + i % 5} w21"}
        for i in range(20)
    ]
    session = Session(tiny_model(), tiny_tokenizer(), rows)
    [mean_probe] = probe_layers(session, [0], pooling="mean")
    assert mean_probe.accuracy.value == 1.0
    alike = [{**row, "rejected": row["chosen"] + " w10"} for row in rows]
    with pytest.raises(ValueError, match=r"Expected layers among \[0, 1, 2\], got \[7\]"):
        probe_layers(session, [0, 7])
    with pytest.raises(ValueError, match="'last' or 'mean', got 'max'"):
        probe_layers(session, [0], pooling="max")
    with pytest.raises(ValueError, match="holds out 1"):
        probe_layers(Session(tiny_model(), tiny_tokenizer(), alike[:5]), [0])
