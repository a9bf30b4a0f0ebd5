"""One LoRA for all inputs: the regression by hand, and the export loaded by stock PEFT."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import convert_to_lora
from torch import Tensor
from torch.nn import functional as F

from equivalence_helpers import batches, inputs
from helpers import (
    D_IN,
    bare_layer,
    fsrl_model,
    only_layer,
    randomize_adapter,
    tiny_model,
    tiny_sae,
    token_ids,
)
from peft_fsrl import FSRLConfig
from peft_fsrl.equivalence import fit_single_lora, insert_projection, measure_fidelity, to_lora
from peft_fsrl.equivalence.reduced_rank import Moments, reduced_rank_regression
from peft_fsrl.steering import fsrl_layers, observe

NO_BIAS = r"`lora_bias=True` was passed but the targeted layer"


def pairs(n: int = 400, d_x: int = 6, d_y: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, d_x, dtype=torch.float64) @ torch.randn(d_x, d_x, dtype=torch.float64)
    x = x + 50.0
    noise = torch.randn(n, d_y, dtype=torch.float64)
    return x, torch.relu(x - 50.0)[:, :d_y] * torch.arange(1, d_y + 1) + 0.3 * noise - 7.0


def moments_of(x: Tensor, y: Tensor, pieces: int = 7) -> Moments:
    moments = Moments()
    for part_x, part_y in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        moments.update(part_x, part_y)
    return moments


def missed(x: Tensor, y: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> float:
    residual = y - (x @ lora_A.T @ lora_B.T + bias)
    return float(residual.square().sum() / y.square().sum())


def test_moments_are_those_of_all_rows() -> None:
    x, y = pairs()
    moments = moments_of(x, y)
    assert moments.n == 400
    torch.testing.assert_close(moments.mean, (x.mean(0), y.mean(0)))
    joint = torch.cat([x, y], dim=1).T.cov(correction=0)
    expected = (joint[:6, :6], joint[6:, :6], joint[6:, 6:])
    torch.testing.assert_close(moments.covariance, expected, rtol=1e-10, atol=1e-10)
    assert moments.size == pytest.approx(float(y.square().sum(1).mean()), rel=1e-12)


@pytest.mark.parametrize("intercept", [True, False])
def test_reduced_rank_by_singular_values_of_the_fitted_values(intercept: bool) -> None:
    # Eckart and Young: the best map of rank r projects the fitted values on their first r
    # principal directions.
    x, y = pairs()
    fit = reduced_rank_regression(moments_of(x, y), intercept=intercept)
    shift_x, shift_y = (x.mean(0), y.mean(0)) if intercept else (torch.zeros(6), torch.zeros(5))
    full = torch.linalg.lstsq(x - shift_x, y - shift_y).solution
    right = torch.linalg.svd((x - shift_x) @ full, full_matrices=False).Vh
    for rank in range(1, fit.max_rank + 1):
        predicted = (x - shift_x) @ full @ right[:rank].T @ right[:rank] + shift_y
        lora_A, lora_B, bias = fit.factors(rank)
        assert lora_A.shape == (rank, 6)
        assert lora_B.shape == (5, rank)
        torch.testing.assert_close(x @ lora_A.T @ lora_B.T + bias, predicted, rtol=1e-8, atol=1e-8)
        assert fit.error(rank) == pytest.approx(missed(x, y, lora_A, lora_B, bias), rel=1e-8)
    errors = [fit.error(rank) for rank in range(1, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5 * errors[-1]


def test_no_map_of_the_rank_is_better() -> None:
    x, y = pairs()
    fit = reduced_rank_regression(moments_of(x, y))
    for rank in (1, 3):
        lora_A, lora_B, bias = fit.factors(rank)
        for _ in range(20):
            nudged = [f + 0.01 * torch.randn_like(f) for f in (lora_A, lora_B, bias)]
            assert missed(x, y, *nudged) > fit.error(rank)


def test_error_on_other_data_and_ridge() -> None:
    x, y = pairs(30)
    other_x, other_y = pairs()
    for ridge in (0.0, 0.5):
        fit = reduced_rank_regression(moments_of(x, y), ridge=ridge)
        factors = fit.factors(5)
        expected = missed(other_x, other_y, *factors)
        found = moments_of(other_x, other_y).error(*factors) * len(other_y)
        assert found / other_y.square().sum() == pytest.approx(expected, rel=1e-8)
        centred = x - x.mean(0)
        covariance = centred.T @ centred / 30
        damping = ridge * covariance.trace() / 6 * torch.eye(6)
        right_side = centred.T @ (y - y.mean(0)) / 30
        by_hand = torch.linalg.solve(covariance + damping, right_side)
        torch.testing.assert_close(factors[1] @ factors[0], by_hand.T, rtol=1e-8, atol=1e-8)


def test_directions_that_do_not_vary_are_left_out() -> None:
    x, y = pairs()
    wide = torch.cat([x, x[:, :2], torch.ones(400, 1)], dim=1)
    fit, narrow = (reduced_rank_regression(moments_of(each, y)) for each in (wide, x))
    assert fit.error(3) == pytest.approx(narrow.error(3), rel=1e-8)
    assert fit.full.abs().max() < 100


def test_bad_ranks_and_no_data() -> None:
    fit = reduced_rank_regression(moments_of(*pairs()))
    for rank in (0, 6):
        with pytest.raises(ValueError, match=f"Expected a rank from 1 to 5, got {rank}"):
            fit.factors(rank)
    with pytest.raises(ValueError, match="Expected tokens at which the adapter changes something"):
        reduced_rank_regression(Moments())


def captured(model: Any, data: Any, module: str) -> tuple[Tensor, Tensor]:
    """A module's input and the change that steering makes, over real tokens, in one piece."""
    layer, given, deltas = only_layer(model), [], []
    reads = layer.base_layer.get_submodule(module).register_forward_hook(
        lambda _module, args, _output: given.append(args[0])
    )
    events: list[Any] = []
    hook = layer.base_layer.register_forward_hook(
        lambda _module, _args, output: deltas.append(
            (output if isinstance(output, Tensor) else output[0]) - events[-1].hidden_states
        )
    )
    with torch.no_grad(), observe(model, events.append):
        for batch in data:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    reads.remove()
    hook.remove()
    masks = [batch["attention_mask"].bool() for batch in data]
    x = torch.cat([each[mask] for each, mask in zip(given, masks, strict=True)]).double()
    y = torch.cat([each[mask] for each, mask in zip(deltas, masks, strict=True)]).double()
    return x, y


def test_the_fit_is_the_regression_on_what_the_module_reads() -> None:
    model, data = fsrl_model(), batches()
    fitted = fit_single_lora(model, data)
    [site], [fit] = fitted.sites, fitted.fits
    assert (site.path, fitted.max_rank) == ("model.layers.1.mlp.down_proj", D_IN)
    assert fitted.adapter_name == "default"
    x, y = captured(model, data, "mlp.down_proj")
    assert fit.moments.n == len(x) == 6 * (72 - 4)
    shifted = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    full = torch.linalg.lstsq(shifted, y, driver="gelsd").solution
    left = float((y - shifted @ full).square().sum() / y.square().sum())
    assert fitted.error(D_IN) == pytest.approx(left, rel=1e-4)
    assert 0 < left < 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gptj"])
def test_stock_peft_loads_the_export(family: str, tmp_path: Path) -> None:
    data = batches()
    model = fsrl_model(tiny_model(family))
    export = to_lora(model, data, 4, held_out=batches(2, seed=50))
    export.save(tmp_path)
    base = tiny_model(family)
    names = {name for name, _ in base.named_modules()}
    assert set(export.config.target_modules) <= names
    with pytest.warns(UserWarning, match=NO_BIAS) if family == "llama" else nullcontext():
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    fitted = fit_single_lora(model, data)
    plain = tiny_model(family)
    with torch.no_grad(), model.disable_adapter(), fitted.applied(4):
        applied = model(**inputs(data[0])).logits
        by_peft = loaded(**inputs(data[0])).logits
        untouched = plain(**inputs(data[0])).logits
    torch.testing.assert_close(by_peft, applied, rtol=1e-4, atol=1e-5)
    assert (applied - untouched).abs().max() > 1e-2
    # The figures beside the export, from the loaded model.
    loss, kl = naive_figures(model, loaded, batches(2, seed=50))
    found = export.comparison.models["LoRA of rank 4"]
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert export.comparison.models["base"].kl > found.kl
    assert f"{found.kl:.5f}" in str(export)
    assert f"{export.error:.1%}" in str(export)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma3_multimodal", "down_proj' does not write"),
        ("gemma4", "down_proj' does not write"),
        ("olmo3", "down_proj' does not write"),
        ("qwen3_moe", "Cannot tell which linear layer"),
        ("gpt_oss", "Cannot tell which linear layer"),
        ("llama4", r"one row for each token, \(8, 9\), found \(72,\), as in an expert"),
    ],
)
def test_refused_models(family: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        to_lora(fsrl_model(tiny_model(family)), batches(), 4)


def naive_figures(steered: Any, other: Any, data: Any) -> tuple[float, float]:
    """Loss of the other and its divergence from the steered model, token by token."""
    losses, divergences = [], []
    for batch in data:
        with torch.no_grad():
            p = F.softmax(steered(**inputs(batch)).logits.double(), dim=-1)
            q = F.softmax(other(**inputs(batch)).logits.double(), dim=-1)
        for row, position in (batch["labels"] != -100).nonzero().tolist():
            left, right = p[row, position - 1], q[row, position - 1]
            losses.append(-float(right[batch["input_ids"][row, position]].log()))
            divergences.append(float((left * (left / right).log()).sum()))
    return sum(losses) / len(losses), sum(divergences) / len(divergences)


def test_compare_by_hand() -> None:
    model, data = fsrl_model(), batches(3)
    comparison = measure_fidelity(model, data)
    assert list(comparison.models) == ["base", "FSRL"]
    assert comparison.n_tokens == sum(int((b["labels"] != -100).sum()) for b in data)
    loss, kl = naive_figures(model, tiny_model(), data)
    assert comparison.models["base"].loss == pytest.approx(loss, rel=1e-5)
    assert comparison.models["base"].kl == pytest.approx(kl, rel=1e-4)
    own_loss, _ = naive_figures(model, model, data)
    assert comparison.models["FSRL"].loss == pytest.approx(own_loss, rel=1e-5)
    assert comparison.models["FSRL"].kl == 0
    assert comparison.kept_kl("base") == 0


def test_without_labels_every_real_token_but_the_first_is_scored() -> None:
    data = [inputs(batch) for batch in batches(1)]
    # Two of nine are padding in two rows, on the right and on the left.
    assert measure_fidelity(fsrl_model(), data).n_tokens == 6 * 8 + 2 * 6
    left = {name: value[1:2] for name, value in data[0].items()}
    cut = {name: value[:, 2:] for name, value in left.items()}
    cut["position_ids"] = torch.arange(2, 9)[None]
    padded, plain = (measure_fidelity(fsrl_model(), [batch]) for batch in (left, cut))
    assert padded.models["FSRL"].loss == pytest.approx(plain.models["FSRL"].loss, rel=1e-4)
    labeled = {**left, "labels": left["input_ids"]}
    assert measure_fidelity(fsrl_model(), [labeled]) == padded


def test_the_base_is_the_base_where_a_module_was_trained_beside() -> None:
    model, data = fsrl_model(modules_to_save=["lm_head"]), batches(2)
    head = model.base_model.model.lm_head.modules_to_save["default"]
    head.weight.data.add_(torch.randn_like(head.weight))
    found = measure_fidelity(model, data).models["base"]
    loss, kl = naive_figures(model, tiny_model(), data)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4)


def test_what_a_lora_does_where_the_adapter_is_silent() -> None:
    model, data = fsrl_model(), batches()
    other = [{"input_ids": token_ids(4, 9, seed=90 + i)} for i in range(2)]
    largest: list[Tensor] = []
    adapter = only_layer(model).fsrl_adapter["default"]
    adapter.threshold.data.zero_()
    with (
        torch.no_grad(),
        observe(model, lambda event: largest.append(event.steering_vector.abs().amax((0, 1)))),
    ):
        for batch in other:
            model(**batch)
    adapter.threshold.data.copy_(torch.stack(largest).amax(0))
    export = to_lora(model, data, 8, other_text=other)
    assert export.comparison.kept_kl("LoRA of rank 8") > 0
    elsewhere = export.elsewhere
    assert elsewhere is not None
    assert elsewhere == measure_fidelity(model, other, fit_single_lora(model, data).stand_ins([8]))
    # The adapter does nothing there, and the LoRA something.
    assert elsewhere.models["base"].kl == 0
    assert elsewhere.models["LoRA of rank 8"].kl > 1e-6
    assert f"On other text:\n{elsewhere}" in str(export)
    without = str(to_lora(model, data, 8, held_out=data))
    assert "On other text: not measured" in without
    assert "On held-out text" in without
    assert "On the data of the fit" in str(export)


def test_too_few_tokens_are_said() -> None:
    # `down_proj` reads 32 numbers.
    few = [{"input_ids": token_ids(7, 9)}]
    with pytest.warns(UserWarning, match="63 tokens are too few to fit a map of 32 inputs"):
        to_lora(fsrl_model(), few, 4)
    # Warnings are errors here.
    to_lora(fsrl_model(), few, 4, ridge=0.1)
    to_lora(fsrl_model(), [{"input_ids": token_ids(8, 8)}], 4)


def test_without_a_bias() -> None:
    model, data = fsrl_model(), batches()
    with_bias, without = (to_lora(model, data, 4, bias=bias) for bias in (True, False))
    assert not without.config.lora_bias
    assert not any("bias" in name for name in without.state_dict)
    assert with_bias.error < without.error


def test_a_projection_is_exact_where_the_adapter_is_linear(tmp_path: Path) -> None:
    model = fsrl_model(tiny_model("gemma2"), non_negative=False)
    only_layer(model).fsrl_adapter["default"].threshold.data.zero_()
    data = batches()
    export = to_lora(model, data, D_IN, target="projection")
    assert export.error < 1e-9
    found = export.comparison.models[f"LoRA of rank {D_IN}"]
    assert found.kl < 1e-9 < 1e-3 < export.comparison.models["base"].kl
    export.save(tmp_path)
    base = tiny_model("gemma2")
    before = base(**inputs(data[0])).logits
    assert insert_projection(base, "model.layers.1") in export.config.target_modules
    assert insert_projection(base, "model.layers.1") in export.config.target_modules
    assert torch.equal(base(**inputs(data[0])).logits, before)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        by_peft, steered = (each(**inputs(data[0])).logits for each in (loaded, model))
    torch.testing.assert_close(by_peft, steered, rtol=1e-3, atol=1e-4)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**inputs(data[0])).logits, steered, rtol=1e-3, atol=1e-4)


def test_a_projection_on_layers_that_return_tuples() -> None:
    base = tiny_model("gptj")
    before = base(**inputs(batches(1)[0])).logits
    path = insert_projection(base, "transformer.h.1")
    projection = base.get_submodule(path)
    assert torch.equal(base(**inputs(batches(1)[0])).logits, before)
    projection.weight.data.mul_(1.5)
    assert not torch.equal(base(**inputs(batches(1)[0])).logits, before)


def test_a_wrapped_linear_carries_its_own_lora() -> None:
    model = fsrl_model(target_modules=["model.layers.1.mlp.down_proj"])
    fitted = fit_single_lora(model, batches())
    assert [site.path for site in fitted.sites] == ["model.layers.1.mlp.down_proj"]
    comparison = measure_fidelity(model, batches(2), fitted.stand_ins([4, 16]))
    base, low, high = (
        comparison.models[name].kl for name in ("base", "LoRA of rank 4", "LoRA of rank 16")
    )
    assert high < low < base


def test_several_layers_get_a_lora_each(tmp_path: Path) -> None:
    hooks = {layer: {"hook_name": f"blocks.{layer}.hook_resid_post"} for layer in (0, 2)}
    saes = {layer: tiny_sae(seed=layer, metadata=hook) for layer, hook in hooks.items()}
    model = fsrl_model(layer=[0, 2], sae=saes)
    export = to_lora(model, batches(), 6)
    paths = {f"model.layers.{layer}.mlp.down_proj" for layer in (0, 2)}
    assert set(export.config.target_modules) == paths
    export.save(tmp_path)
    with pytest.warns(UserWarning, match=NO_BIAS):
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    _, kl = naive_figures(model, loaded, batches())
    assert export.comparison.models["LoRA of rank 6"].kl == pytest.approx(kl, rel=1e-4)


def test_what_does_not_write_to_the_residual_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.down_proj' does not write.*norm"):
        fit_single_lora(fsrl_model(tiny_model("gemma2")), batches(2))
    # The MLP reads what attention writes, and answers it.
    model = fsrl_model()
    for name in ("gate_proj", "up_proj", "down_proj"):
        only_layer(model).base_layer.mlp.get_submodule(name).weight.data.mul_(20)
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.o_proj' does not write"):
        fit_single_lora(model, batches(2), target="self_attn.o_proj")
    # In a parallel block the MLP does not read what attention writes.
    parallel = fit_single_lora(fsrl_model(tiny_model("gptj")), batches(), target="attn.out_proj")
    assert parallel.sites[0].path == "transformer.h.1.attn.out_proj"
    with pytest.raises(ValueError, match=r"Cannot find the linear layer 'x' in 'model.layers.1'"):
        fit_single_lora(fsrl_model(), batches(1), target="x")
    model = fsrl_model(target_modules=["model.layers.1.input_layernorm"])
    with pytest.raises(ValueError, match="Cannot tell which linear layer"):
        fit_single_lora(model, batches(1))


def test_bad_data() -> None:
    model = fsrl_model()
    for data in (iter(batches(1)), batches(1)[0]):
        with pytest.raises(TypeError, match="batches that can be read several times"):
            fit_single_lora(model, data)
    with pytest.raises(TypeError, match=r"Expected a mapping with `input_ids`.*got Tensor"):
        fit_single_lora(model, [token_ids()])
    with pytest.raises(ValueError, match="Expected at least one batch, found none"):
        fit_single_lora(model, [])
    unlabeled = [{**batches(1)[0], "labels": torch.full((8, 9), -100)}]
    with pytest.raises(ValueError, match="Expected at least one token to predict"):
        measure_fidelity(model, unlabeled)


def test_only_layers_where_the_active_adapter_acts() -> None:
    hooks = {layer: {"hook_name": f"blocks.{layer}.hook_resid_post"} for layer in (0, 2)}
    saes = {layer: tiny_sae(seed=layer, metadata=hook) for layer, hook in hooks.items()}
    model = fsrl_model(layer=0, sae=saes[0])
    model.add_adapter("other", FSRLConfig(layer=2, sae=saes[2], task_type="CAUSAL_LM"))
    randomize_adapter(fsrl_layers(model)["model.layers.2"], "other")
    for name, layer in (("default", 0), ("other", 2)):
        model.set_adapter(name)
        fitted = fit_single_lora(model, batches())
        assert fitted.adapter_name == name
        assert [site.path for site in fitted.sites] == [f"model.layers.{layer}.mlp.down_proj"]
    with model.disable_adapter(), pytest.raises(ValueError, match="No adapter is active"):
        fit_single_lora(model, batches())


def test_what_is_tried_out_is_not_lost_in_rounding() -> None:
    # The residual stream of large models is much larger than what one layer adds to it.
    base = tiny_model()
    base.model.embed_tokens.weight.data.mul_(3000)
    model = fsrl_model(base.bfloat16(), sae_dtype="float32")
    assert fit_single_lora(model, batches(12)).sites[0].path == "model.layers.1.mlp.down_proj"


def test_nothing_is_left_behind() -> None:
    model = fsrl_model().train()
    data = batches(2)
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    to_lora(model, data, 3)
    assert {n: len(m._forward_hooks) for n, m in model.named_modules()} == before
    assert model.training
    assert only_layer(model).edits == only_layer(model).observers == []


def test_pefts_own_conversion_refuses() -> None:
    # It asks a layer for the change of a weight, and there is none without data.
    assert not bare_layer(tiny_sae()).supports_lora_conversion()
    with pytest.raises(
        TypeError, match=r"FSRLLayer.*do not support LoRA conversion|do not support"
    ):
        convert_to_lora(fsrl_model(), rank=4)
