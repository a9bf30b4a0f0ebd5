"""The fit of an SAE against a computation in one piece, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

import helpers
from peft_fsrl import organism
from peft_fsrl.analysis import Checkup, SAEFit, Session, compute_checkup
from peft_fsrl.analysis.checkup import judge_fits
from peft_fsrl.training.tokens import tokenize

ROWS = list(helpers.tiny_preferences(7))


def states_of_tokens(model: Any, layer: int, rows: list[dict[str, str]]) -> list[Tensor]:
    """Output of a layer for each text alone: no batch, no padding, no hook."""
    found = []
    for row in rows:
        ids = tokenize(row["prompt"], row["chosen"], helpers.tiny_tokenizer()).input_ids
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        # The last entry has passed the final norm, so no test looks at the last layer here.
        found.append((torch.tensor(ids), output.hidden_states[layer + 1][0]))
    return found


def naive_fit(sae: SAE[Any], model: Any, layer: int) -> tuple[float, float, float, int]:
    """FVU, l0, dead share and tokens, all tokens at once in float64, special ones left out."""
    xs, reconstructions, acts = [], [], []
    for ids, states in states_of_tokens(model, layer, ROWS):
        with torch.no_grad():
            f = sae.encode(states[None])
            decoded = sae.decode(f)
        ordinary = ids > 2
        xs.append(states[ordinary].double())
        reconstructions.append(decoded[0, ordinary].double())
        acts.append(f[0, ordinary])
    x, decoded, f = torch.cat(xs), torch.cat(reconstructions), torch.cat(acts)
    error = ((x - decoded) ** 2).sum()
    spread = ((x - x.mean(dim=0)) ** 2).sum()
    dead = (f == 0).all(dim=0).double().mean()
    return float(error / spread), float((f != 0).sum(dim=1).double().mean()), float(dead), len(x)


def checkup(sae: SAE[Any], model: Any, **options: Any) -> Checkup:
    size = options.pop("batch_size", 3)
    session = Session(model, helpers.tiny_tokenizer(), ROWS, batch_size=size)
    return compute_checkup(session, sae, **options)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gptj"])
def test_streamed_figures_equal_those_in_one_piece(family: str) -> None:
    model, sae = helpers.tiny_model(family), helpers.tiny_sae("jumprelu")
    fits = {fit.hook: fit for fit in checkup(sae, model).fits}
    for layer in (0, 1):
        fit = fits[f"blocks.{layer}.hook_resid_post"]
        fvu, l0, dead, n_tokens = naive_fit(sae, model, layer)
        assert fit.fvu == pytest.approx(fvu, rel=1e-5)
        assert fit.l0 == pytest.approx(l0, rel=1e-6)
        assert fit.dead == pytest.approx(dead)
        assert fit.n_tokens == n_tokens
        assert fit.intended == (layer == 1)


@pytest.mark.parametrize(
    ("architecture", "normalization"),
    [("standard", "layer_norm"), ("topk", "constant_norm_rescale"), ("temporal", "none")],
)
def test_normalized_and_contextual_saes(architecture: str, normalization: str) -> None:
    model, sae = helpers.tiny_model(), helpers.tiny_sae(architecture, normalization)
    [fit] = [fit for fit in checkup(sae, model).fits if fit.intended]
    assert fit.fvu == pytest.approx(naive_fit(sae, model, 1)[0], rel=1e-5)


def test_between_attention_and_mlp() -> None:
    model, sae = helpers.tiny_model(), helpers.tiny_sae()
    [fit] = [fit for fit in checkup(sae, model).fits if fit.hook == "blocks.1.hook_resid_mid"]
    xs, error = [], 0.0
    for ids, before in states_of_tokens(model, 0, ROWS):
        layer = model.model.layers[1]
        position = torch.arange(len(ids))[None]
        with torch.no_grad():
            turned = model.model.rotary_emb(before[None], position)
            normed = layer.input_layernorm(before[None])
            attended, _ = layer.self_attn(
                normed, position_embeddings=turned, attention_mask=_causal(len(ids))
            )
            x = before + attended[0]
            decoded = sae.decode(sae.encode(x))
        ordinary = ids > 2
        xs.append(x[ordinary].double())
        error += float(((x - decoded)[ordinary].double() ** 2).sum())
    x = torch.cat(xs)
    assert fit.fvu == pytest.approx(error / float(((x - x.mean(0)) ** 2).sum()), rel=1e-5)


def _causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)[None, None]


def test_batches_do_not_matter() -> None:
    model, sae = helpers.tiny_model(), helpers.tiny_sae()
    one, all_at_once = (checkup(sae, model, batch_size=size).fits for size in (1, 7))
    for first, second in zip(one, all_at_once, strict=True):
        assert first.fvu == pytest.approx(second.fvu, rel=1e-6)


def test_attention_and_mlp_outputs_are_places_too() -> None:
    sae = helpers.tiny_sae(metadata={"hook_name": "blocks.1.hook_mlp_out"})
    fits = checkup(sae, helpers.tiny_model()).fits
    assert [fit.hook for fit in fits if fit.intended] == ["blocks.1.hook_mlp_out"]
    hooks = {fit.hook for fit in fits}
    assert {"blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out", "blocks.1.hook_resid_post"} <= hooks


def test_the_model_is_left_as_it_was() -> None:
    model = helpers.tiny_model().train()
    checkup(helpers.tiny_sae(), model)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_another_model_for_comparison() -> None:
    model, sae = helpers.tiny_model(), helpers.tiny_sae()
    found = checkup(
        sae, model, compare_model=helpers.tiny_model(seed=1), model_name="chat", compare_name="base"
    )
    [other] = [fit for fit in found.fits if fit.model == "base"]
    assert other.hook == "blocks.1.hook_resid_post"
    assert not other.intended
    assert other.fvu == pytest.approx(naive_fit(sae, helpers.tiny_model(seed=1), 1)[0], rel=1e-5)
    assert found.findings[-1].question == "Does it fit chat as well as base?"
    with pytest.raises(ValueError, match="two models"):
        checkup(sae, model, compare_model=model, model_name="one", compare_name="one")


def test_what_cannot_be_measured() -> None:
    model, sae = helpers.tiny_model(), helpers.tiny_sae()
    tokenizer = helpers.tiny_tokenizer()
    with pytest.raises(ValueError, match="at least two ordinary tokens"):
        compute_checkup(Session(model, tokenizer, [{"prompt": "", "chosen": ""}]), sae)
    with pytest.raises(ValueError, match="Layer 9 does not exist"):
        checkup(sae, model, layer=9)
    with pytest.raises(ValueError, match="reads activations of width 8"):
        checkup(helpers.tiny_sae(d_in=8), model)
    nowhere = helpers.tiny_sae(metadata={"hook_name": "somewhere"})
    with pytest.raises(ValueError, match="Expected `layer`"):
        checkup(nowhere, model)
    assert checkup(nowhere, model, layer=0).fits[0].hook == "blocks.0.hook_resid_post"


HERE = SAEFit("blocks.2.hook_resid_post", "m", True, 1000, 0.2, 12.0, 0.1)
NEAR = replace(HERE, hook="blocks.1.hook_resid_post", intended=False, fvu=0.4)


@pytest.mark.parametrize(
    ("fvu", "verdict"), [(0.35, "yes"), (0.36, "unsure"), (0.5, "unsure"), (0.51, "no"), (2, "no")]
)
def test_limits_of_a_fit(fvu: float, verdict: str) -> None:
    assert judge_fits([replace(HERE, fvu=fvu)])[0].verdict == verdict


@pytest.mark.parametrize(("fvu", "verdict"), [(0.21, "yes"), (0.19, "unsure"), (0.17, "no")])
def test_limits_of_a_better_place(fvu: float, verdict: str) -> None:
    finding = judge_fits([HERE, NEAR, replace(NEAR, hook="elsewhere", fvu=fvu)])[1]
    assert finding.verdict == verdict
    assert "elsewhere" in finding.answer


@pytest.mark.parametrize(
    ("l0", "dead", "verdict"), [(12, 0.1, "yes"), (0.9, 0.1, "no"), (12, 0.91, "unsure")]
)
def test_limits_of_life(l0: float, dead: float, verdict: str) -> None:
    assert judge_fits([replace(HERE, l0=l0, dead=dead)])[1].verdict == verdict


def test_the_organism_at_its_layer_and_off_by_one() -> None:
    built = organism.load()
    model, tokenizer = built.load_model(), built.load_tokenizer()
    rows = list(organism.preferences(40, seed="doctor"))
    verdicts = {}
    for layer in (built.layer - 1, built.layer, built.layer + 1):
        found = compute_checkup(Session(model, tokenizer, rows), str(built.sae_path), layer=layer)
        verdicts[layer] = [finding.verdict for finding in found.findings]
    assert verdicts[built.layer] == ["yes", "yes", "yes"]
    for layer in (built.layer - 1, built.layer + 1):
        assert verdicts[layer][1] == "no", "it fits better at its own layer"
    assert verdicts[built.layer + 1][0] == "no"
