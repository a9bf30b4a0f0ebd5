"""From LoRA to FSRL and from any fine-tune to features: planted cases come back."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from equivalence_helpers import batches, inputs
from helpers import D_IN, D_SAE, bare_layer, fsrl_model, only_layer, tiny_model, tiny_sae, token_ids
from peft_fsrl import FSRLLayer, freeze_sae
from peft_fsrl.equivalence import (
    NotAffineError,
    explain,
    from_factors,
    from_lora,
    insert_projection,
)
from peft_fsrl.equivalence.explain import _share
from peft_fsrl.equivalence.selection import compute_chance, select_features

PLANTED = [3, 8, 21]
# PEFT takes the bias of `lora_bias=True` for a shard of a matrix when it saves.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor:UserWarning")


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def steered_by(adapter: Any, sae: Any, x: Tensor) -> Tensor:
    """Through a real layer, in float64."""
    layer = FSRLLayer(torch.nn.Identity(), "identity")
    layer.update_layer("default", adapter.config(sae, layer=0), adapter.sae)
    layer.double()
    adapter.fill(layer, "default")
    return layer(x).detach()


SAES = {
    "standard": {},
    "gated": {},
    "topk": {"rescale_acts_by_decoder_norm": True},
    "abstopk": {},
    "matching_pursuit": {},
    "temporal": {"normalize": "constant_scalar_rescale"},
}


@pytest.mark.parametrize("architecture", SAES)
def test_a_lora_in_the_span_is_an_adapter(architecture: str) -> None:
    settings = dict(SAES[architecture])
    normalization = settings.pop("normalize", "none")
    sae = tiny_sae(architecture, normalization, dtype="float64", **settings)
    frozen = freeze_sae(sae)
    lora_A, mixture = random(2, D_IN), random(3, 2, seed=1)
    lora_B = sae.W_dec[PLANTED].T.detach() @ mixture
    bias = sae.W_dec[PLANTED].T.detach() @ random(3, seed=2)
    x = random(1, 5, D_IN, seed=3)
    expected = x + x @ lora_A.T @ lora_B.T + bias
    for features in (PLANTED, None):
        adapter = from_factors(lora_A, lora_B, frozen, bias=bias, features=features)
        assert adapter.projection_error < 1e-12
        assert adapter.weight.shape == (3 if features else D_SAE, 2)
        for each in (adapter, adapter.merged()):
            actual = steered_by(each, frozen, x)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_outside_the_span_the_nearest_is_taken() -> None:
    sae = tiny_sae(dtype="float64")
    lora_A, lora_B, bias = random(2, D_IN), random(D_IN, 2, seed=1), random(D_IN, seed=2)
    adapter = from_factors(lora_A, lora_B, sae, bias=bias, features=PLANTED)
    basis = torch.linalg.svd(sae.W_dec[PLANTED].T.detach(), full_matrices=False).U
    wanted = torch.cat([lora_B, bias[:, None]], dim=1)
    outside = wanted - basis @ (basis.T @ wanted)
    expected = float(outside.norm() / wanted.norm())
    assert adapter.projection_error == pytest.approx(expected, rel=1e-10)
    assert 0.5 < expected < 1
    x = random(1, 4, D_IN, seed=3)
    nearest = (x @ lora_A.T @ lora_B.T + bias) @ basis @ basis.T
    torch.testing.assert_close(steered_by(adapter, freeze_sae(sae), x), x + nearest)


def test_factors_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"A of shape \(rank, 16\).*found \(2, 8\) and \(16, 2\)"):
        from_factors(random(2, 8), random(D_IN, 2), tiny_sae())
    with pytest.raises(ValueError, match=r"found \(2, 16\) and \(16, 3\)"):
        from_factors(random(2, D_IN), random(D_IN, 3), tiny_sae())
    with pytest.raises(NotAffineError, match="layer_norm"):
        from_factors(random(2, D_IN), random(D_IN, 2), tiny_sae("standard", "layer_norm"))


def projected_lora(lora_B: Tensor, folder: Path) -> Any:
    """A base model with a projection behind layer 1, and on it a LoRA of scaling 2 in a folder."""
    base = tiny_model()
    path = insert_projection(base, "model.layers.1")
    rank = lora_B.shape[1]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[path], lora_bias=True)
    tuned = get_peft_model(base, config)
    layer = tuned.base_model.model.get_submodule(path)
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(lora_B)
        layer.lora_A["default"].weight.copy_(random(rank, D_IN, seed=4))
        layer.lora_B["default"].bias.copy_(lora_B.sum(dim=1))
    tuned.save_pretrained(folder)
    return tuned.unload()


def test_from_lora_by_algebra(tmp_path: Path) -> None:
    sae = tiny_sae()
    base = projected_lora(sae.W_dec[PLANTED].T.detach().double() @ random(3, 3), tmp_path)
    before = base(**inputs(batches(1)[0])).logits
    found = from_lora(base, str(tmp_path), sae, batches())
    assert {each.feature for each in found.features} == set(PLANTED)
    assert found.adapter.weight.shape == (3, 3)
    assert found.adapter.projection_error < 1e-6
    assert found.explained.value == pytest.approx(1, abs=1e-8)
    assert torch.equal(base(**inputs(batches(1)[0])).logits, before)
    attached = found.attach(tiny_model())
    tuned = PeftModel.from_pretrained(base, tmp_path)
    for batch in batches(2):
        with torch.no_grad():
            expected, actual = (model(**inputs(batch)).logits for model in (tuned, attached))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    attached.save_pretrained(tmp_path / "fsrl")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "fsrl").eval()
    torch.testing.assert_close(again(**inputs(batch)).logits, actual)


def test_from_lora_takes_all_features_where_few_do_not_do(tmp_path: Path) -> None:
    base = projected_lora(random(D_IN, 8), tmp_path)
    found = from_lora(base, tmp_path, tiny_sae(), batches(), n_features=4)
    assert len(found.features) == 4
    assert found.in_features.value < 0.99
    assert found.adapter.weight.shape == (D_SAE, 8)
    assert found.explained.value == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_from_lora_on_the_linear_layer_that_the_sae_reads(bias: bool) -> None:
    base, sae = tiny_model("phi" if bias else "llama"), tiny_sae(metadata={})
    path = "model.layers.1.self_attn." + ("dense" if bias else "o_proj")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[path], init_lora_weights=False)
    tuned = get_peft_model(base, config).eval()
    found = from_lora(base, tuned, sae, batches(), module=path, n_features=2)
    # The features' span is not B's: the whole dictionary is needed, and is enough.
    assert found.adapter.projection_error < 1e-10
    assert found.explained.value == pytest.approx(1, abs=1e-6)
    assert isinstance(tuned, PeftModel)
    assert any("lora" in name for name, _ in tuned.named_parameters())


@pytest.mark.parametrize("kind", ["dora", "two", "embedding"])
def test_a_lora_that_is_not_one_product_is_fitted(kind: str) -> None:
    base, sae = tiny_model(), tiny_sae(metadata={})
    place = {"module": "model.embed_tokens"} if kind == "embedding" else {"layer": 1}
    path = place.get("module") or insert_projection(base, "model.layers.1")
    settings: dict[str, Any] = {"target_modules": [path], "init_lora_weights": False}
    tuned = get_peft_model(base, LoraConfig(r=2, use_dora=kind == "dora", **settings)).eval()
    if kind == "two":
        tuned.add_adapter("other", LoraConfig(r=3, **settings))
        tuned.base_model.set_adapter(["default", "other"])
    if kind == "dora":
        layer = tuned.base_model.model.get_submodule(path)
        layer.lora_magnitude_vector["default"].weight.data.mul_(1.5)
    by_fit = explain(base, tuned, sae, batches(), **place)
    found = from_lora(base, tuned, sae, batches(), **place)
    assert found.explained == by_fit.explained
    assert found.features == by_fit.features


def test_from_lora_elsewhere_is_fitted() -> None:
    base, sae = tiny_model(), tiny_sae()
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(base, config).eval()
    fitted, explained = from_lora(base, tuned, sae, batches()), explain(base, tuned, sae, batches())
    assert fitted.features == explained.features
    assert 0 < fitted.explained.value < fitted.in_features.value <= 1


@pytest.mark.parametrize("settings", [{}, {"activation": "relu"}, {"non_negative": False}])
def test_explain_names_the_planted_features(settings: dict[str, Any]) -> None:
    sae = tiny_sae("jumprelu", apply_b_dec_to_input=False)
    tuned = fsrl_model(sae=sae, features=PLANTED, **settings)
    # The tiny model's activations are small: without this, a feature might steer no token.
    adapter = only_layer(tuned).fsrl_adapter["default"]
    adapter.weight.data.mul_(40)
    adapter.bias.data.fill_(0.5)
    found = explain(tiny_model(), tuned, sae, batches())
    assert {each.feature for each in found.features} == set(PLANTED)
    assert found.in_features.value == pytest.approx(1, abs=1e-6)
    assert found.adapter.sae.features == tuple(PLANTED)
    assert found.place == "model.layers.1"
    same = explain(tuned, tuned, sae, batches())
    assert [each.feature for each in same.features] == [each.feature for each in found.features]
    assert same.explained.value == pytest.approx(found.explained.value, abs=1e-6)


def test_explain_recovers_a_linear_adapter_whole() -> None:
    sae = tiny_sae()
    tuned = fsrl_model(sae=sae, features=PLANTED, non_negative=False)
    adapter = only_layer(tuned).fsrl_adapter["default"]
    adapter.threshold.data.zero_()
    found = explain(tiny_model(), tuned, sae, batches(12), held_out=batches(2, seed=90))
    assert found.explained.value == pytest.approx(1, abs=1e-5)
    attached = only_layer(found.attach(tiny_model())).fsrl_adapter["default"]
    x = random(7, D_IN).float()
    torch.testing.assert_close(
        x @ attached.weight.T + attached.bias,
        x @ adapter.weight.T + adapter.bias,
        rtol=0.02,
        atol=0.02,
    )


def test_the_figures_of_an_explanation_by_hand() -> None:
    sae = tiny_sae()
    tuned, base = fsrl_model(sae=sae), tiny_model()
    held_out = batches(2, seed=70)
    found = explain(base, tuned, sae, batches(), held_out=held_out, n_features=3)
    rows: list[list[Tensor]] = []
    fitted = found.attach(tiny_model())
    for batch in held_out:
        states = []
        for model in (base, tuned, fitted):
            with torch.no_grad():
                output = model(**inputs(batch), output_hidden_states=True)
            states.append(output.hidden_states[2].double())
        for row, mask in enumerate(batch["attention_mask"].bool()):
            rows.append([state[row][mask] for state in states])
    deltas = [tuned_x - x for x, tuned_x, _ in rows]
    wrong = [tuned_x - fitted_x for _, tuned_x, fitted_x in rows]
    total = sum(float(delta.square().sum()) for delta in deltas)
    size = sum(float(x.square().sum()) for x, _, _ in rows)
    assert found.n_tokens == sum(len(delta) for delta in deltas)
    assert found.change == pytest.approx(total / size, rel=1e-4)
    left = sum(float(each.square().sum()) for each in wrong)
    assert found.explained.value == pytest.approx(1 - left / total, rel=1e-3)
    directions = sae.W_dec[[each.feature for each in found.features]].double().detach()
    basis = torch.linalg.qr(directions.T).Q
    inside = sum(float((delta @ basis).square().sum()) for delta in deltas)
    assert found.in_features.value == pytest.approx(inside / total, rel=1e-4)
    assert found.in_dictionary.value == pytest.approx(1, abs=1e-10)
    shares = [each.share for each in found.features]
    assert shares == sorted(shares, reverse=True)
    text = str(found)
    assert f"{found.explained.value:.1%} ± {found.explained.standard_error:.1%}" in text
    assert f"{found.features[0].feature:10}" in text


def test_the_standard_error_is_that_of_a_bootstrap() -> None:
    total = random(200, seed=1).abs() + 1
    missed = 0.3 * total + 0.1 * random(200, seed=2).abs()
    share = _share(missed, total)
    assert share.value == pytest.approx(1 - float(missed.sum() / total.sum()))
    draws = torch.randint(200, (4000, 200), generator=torch.Generator().manual_seed(0))
    spread = (missed[draws].sum(1) / total[draws].sum(1)).std()
    assert share.standard_error == pytest.approx(float(spread), rel=0.05)
    assert _share(missed[:1], total[:1]).standard_error != _share(missed, total).standard_error


def brute_force(second: Tensor, directions: Tensor, k: int) -> tuple[set[int], float]:
    def spanned(chosen: tuple[int, ...]) -> float:
        basis = torch.linalg.qr(directions[list(chosen)].T).Q
        return float((basis.T @ second @ basis).trace() / second.trace())

    best = max(combinations(range(len(directions)), k), key=spanned)
    return set(best), spanned(best)


def test_chance_by_hand() -> None:
    # With a flat spectrum any four directions of eight span a half.
    directions, flat = random(20, 8), torch.eye(8, dtype=torch.float64)
    assert compute_chance(flat, directions, n_features=4) == pytest.approx(0.5)
    assert compute_chance(flat, directions, n_features=8) == pytest.approx(1)
    # One random direction in 64 and an orthonormal dictionary: the share is the largest square of
    # its coordinates.
    line = torch.zeros(64, 64, dtype=torch.float64)
    line[0, 0] = 3.0
    draws = random(2000, 64).square()
    mean = float((draws.amax(dim=1) / draws.sum(dim=1)).mean())
    axes = torch.eye(64, dtype=torch.float64)
    found = [compute_chance(line, axes, n_features=1, seed=seed) for seed in range(200)]
    assert sum(found) / 200 == pytest.approx(mean, rel=0.1)


def test_a_planted_change_is_above_chance_and_says_so() -> None:
    sae, tuned = tiny_sae(), fsrl_model(features=PLANTED[:1], non_negative=False)
    found = explain(tiny_model(), tuned, sae, batches())
    assert found.in_features.value == pytest.approx(1, abs=1e-6)
    assert 0 < found.chance < 0.6
    assert f"by chance      {found.chance:.1%}" in str(found)
    assert "tokens, those of the fit)" in str(found)


def test_too_few_tokens_are_said() -> None:
    sae, tuned = tiny_sae(), fsrl_model()
    few = [{"input_ids": token_ids(3, 7)}]
    with pytest.warns(UserWarning, match="21 tokens are too few to fit a map of 16 inputs"):
        explain(tiny_model(), tuned, sae, few, held_out=batches(2, seed=40))


@pytest.mark.parametrize("seed", range(6))
def test_selection_against_all_triples(seed: int) -> None:
    directions, mixture = random(14, 8, seed=seed), random(3, 3, seed=seed + 50)
    planted = directions[[1, 6, 9]].T @ mixture
    second = planted @ planted.T
    found = select_features(second, directions, n_features=8, min_gain=1e-6)
    assert set(found.features) == {1, 6, 9}
    assert found.spanned == pytest.approx(1, abs=1e-9)
    noisy = second + 0.05 * float(second.trace()) / 8 * torch.eye(8, dtype=torch.float64)
    found = select_features(noisy, directions, n_features=3, min_gain=1e-6)
    best, share = brute_force(noisy, directions, 3)
    assert found.spanned == pytest.approx(share, rel=1e-6)
    assert set(found.features) == best


def test_a_decoy_between_two_features_is_exchanged() -> None:
    # Greedy takes the decoy first, which lies between both, and two more are then needed.
    directions = torch.eye(6, dtype=torch.float64)
    decoy = (directions[0] + directions[1]) / 2**0.5 + 0.1 * directions[2]
    rows = torch.cat([decoy[None], directions])
    second = torch.diag(torch.tensor([1.0, 1.0, 0, 0, 0, 0], dtype=torch.float64))
    second[0, 1] = second[1, 0] = 0.5
    found = select_features(second, rows, n_features=5, min_gain=1e-4)
    assert set(found.features) == {1, 2}
    assert found.spanned == pytest.approx(1)
    assert found.shares == pytest.approx((0.5, 0.5))


def test_repeated_and_dead_features() -> None:
    directions = torch.cat([random(5, 4), torch.zeros(2, 4, dtype=torch.float64)])
    rows = torch.cat([directions, directions])
    second = directions[1][:, None] @ directions[1][None]
    found = select_features(second, rows, n_features=9, min_gain=1e-4)
    assert found.features in ((1,), (8,))


@pytest.mark.parametrize("read", [explain, from_lora])
def test_a_change_outside_the_dictionary_is_named(read: Any, tmp_path: Path) -> None:
    sae = tiny_sae(d_sae=4)
    outside = torch.linalg.svd(sae.W_dec.detach()).Vh[4:6].T
    base = projected_lora(outside.double(), tmp_path)
    tuned = PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match=r"No feature's direction holds a share of 0.001 of the"):
        read(base, tuned, sae, batches())


def test_refusals() -> None:
    base, sae = tiny_model(), tiny_sae()
    with pytest.raises(ValueError, match="`base` and `tuned` are the same model"):
        explain(base, base, sae, batches(1))
    with pytest.raises(ValueError, match=r"Nothing changes at 'model.layers.1': the models agree"):
        explain(base, tiny_model(), sae, batches(1))
    with pytest.raises(TypeError, match="batches that can be read several times"):
        explain(base, tiny_model(seed=1), sae, iter(batches(1)))
    with pytest.raises(NotAffineError, match="layer_norm"):
        explain(base, tiny_model(seed=1), tiny_sae("standard", "layer_norm"), batches(1))
    assert bare_layer(sae) is not None
