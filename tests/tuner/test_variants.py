"""Adapters on several layers, on some features, of low rank, and mixed in one batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import helpers
from peft_fsrl import FSRLConfig, FSRLLayer, freeze_sae
from peft_fsrl.steering import ablate_features, fsrl_layers, observe, only_features, top_k_steering

SOME = [2, 3, 5, 7, 11, 13, 17, 19]


def logits(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    ids = helpers.token_ids() if ids is None else ids
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def layers_of(model: PeftModel) -> list[FSRLLayer]:
    return [module for module in model.modules() if isinstance(module, FSRLLayer)]


# Some features


@pytest.mark.parametrize(("architecture", "normalization"), helpers.SAE_CASES)
def test_a_restricted_sae_is_the_whole_one_on_its_features(
    architecture: str, normalization: str
) -> None:
    sae = helpers.tiny_sae(architecture, normalization, dtype="float64")
    whole, some = freeze_sae(sae), freeze_sae(sae).restrict(SOME)
    x = torch.randn(2, 5, helpers.D_IN, dtype=torch.float64)
    torch.testing.assert_close(some.encode(x), whole.encode(x)[..., SOME], rtol=1e-12, atol=1e-12)
    update = torch.randn(2, 5, len(SOME), dtype=torch.float64)
    spread = torch.zeros(2, 5, helpers.D_SAE, dtype=torch.float64)
    spread[..., SOME] = update
    torch.testing.assert_close(
        some.decode_update(update, x), whole.decode_update(spread, x), rtol=1e-12, atol=1e-12
    )
    assert some.n_features == len(SOME)
    assert some.feature_index.tolist() == SOME
    assert freeze_sae(sae).restrict(SOME) is some
    assert some.restrict([3, 11]).feature_index.tolist() == [3, 11]
    assert some.positions([3, 4, 11]).tolist() == [1, 4]


def test_restriction_refuses_what_is_not_there() -> None:
    sae = freeze_sae(helpers.tiny_sae())
    with pytest.raises(IndexError, match="Feature 24 does not exist"):
        sae.restrict([1, 24])
    with pytest.raises(ValueError, match="at least one"):
        sae.restrict([])
    with pytest.raises(ValueError, match="among the 8"):
        sae.restrict(SOME).restrict([4])
    with pytest.raises(ValueError, match="Only a whole SAE"):
        sae.restrict(SOME).save("unused")


@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "jumprelu"])
@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_steering_some_features_is_steering_all_with_the_others_zeroed(
    architecture: str, activation: str
) -> None:
    sae = helpers.tiny_sae(architecture)
    whole = helpers.fsrl_model(sae=sae, activation=activation)
    some = helpers.fsrl_model(sae=sae, activation=activation, features=SOME)
    source = helpers.only_layer(whole).fsrl_adapter["default"]
    target = helpers.only_layer(some).fsrl_adapter["default"]
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(source.get_parameter(name)[SOME])
    with only_features(whole, SOME):
        expected = logits(whole)
    torch.testing.assert_close(logits(some), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected, logits(whole))
    # Edits name features of the whole SAE; those that are not steered change nothing.
    with only_features(whole, [3, 11]):
        expected = logits(whole)
    with only_features(some, [3, 4, 11]):
        torch.testing.assert_close(logits(some), expected, rtol=1e-5, atol=1e-6)
    with ablate_features(some, [0, 1, 4]):
        assert torch.equal(logits(some), logits(some))


def test_checkpoint_and_parameters_are_in_proportion(tmp_path: Path) -> None:
    sae = helpers.tiny_sae()
    model = helpers.fsrl_model(sae=sae, features=SOME[::-1])
    assert model.get_nb_trainable_parameters()[0] == len(SOME) * (helpers.D_IN + 2)
    model.save_pretrained(tmp_path)
    shapes = {tuple(t.shape) for t in load_file(tmp_path / "adapter_model.safetensors").values()}
    assert shapes == {(len(SOME), helpers.D_IN), (len(SOME),), (32,)}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["features"] == SOME
    # The SAE beside it is the whole one.
    assert load_file(tmp_path / "sae" / "sae_weights.safetensors")["W_dec"].shape[0] == 24
    again = PeftModel.from_pretrained(helpers.tiny_model(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_excluding_features_is_choosing_the_rest() -> None:
    rest = [index for index in range(helpers.D_SAE) if index not in SOME]
    model = helpers.fsrl_model(exclude_features=SOME)
    assert helpers.only_layer(model).fsrl_sae["default"].feature_index.tolist() == rest


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"features": [1], "exclude_features": [2]}, ValueError, "not both"),
        ({"features": []}, ValueError, "at least one"),
        ({"features": [-1]}, ValueError, "0 or more"),
        ({"features": [3, 24]}, IndexError, "Feature 24 does not exist"),
        ({"exclude_features": [24]}, IndexError, "feature 24, but the SAE has features 0 to 23"),
        ({"rank": 0}, ValueError, "1 or more"),
        ({"rank": 1.5}, ValueError, "1 or more"),
        ({"layers_to_transform": [1]}, ValueError, "Give both"),
    ],
)
def test_wrong_options(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        helpers.fsrl_model(**settings)


# Low rank


def test_low_rank_is_a_product(tmp_path: Path) -> None:
    sae = helpers.tiny_sae()
    whole, low = helpers.fsrl_model(sae=sae), helpers.fsrl_model(sae=sae, rank=3)
    full = helpers.only_layer(whole).fsrl_adapter["default"]
    factors = helpers.only_layer(low).fsrl_adapter["default"]
    assert factors.weight.shape == (helpers.D_SAE, 3)
    assert factors.down.shape == (3, helpers.D_IN)
    with torch.no_grad():
        full.weight.copy_(factors.weight @ factors.down)
        full.bias.copy_(factors.bias)
        full.threshold.copy_(factors.threshold)
    torch.testing.assert_close(logits(low), logits(whole), rtol=1e-5, atol=1e-6)
    low.save_pretrained(tmp_path)
    names = {key.rsplit(".", 1)[-1] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"weight", "down", "bias", "threshold", "identity"}
    again = PeftModel.from_pretrained(helpers.tiny_model(), tmp_path).eval()
    assert torch.equal(logits(again), logits(low))


def test_low_rank_trains() -> None:
    model = get_peft_model(helpers.tiny_model(), FSRLConfig(sae=helpers.tiny_sae(), rank=2))
    model(input_ids=helpers.token_ids()).logits.square().mean().backward()
    adapter = helpers.only_layer(model).fsrl_adapter["default"]
    assert adapter.weight.grad.abs().sum() > 0
    assert adapter.down.grad is not None


# Several layers


def several(**settings: Any) -> tuple[PeftModel, dict[int, Any]]:
    saes = {
        layer: helpers.tiny_sae(
            "standard" if layer else "jumprelu",
            seed=layer,
            metadata={"hook_name": f"blocks.{layer}.hook_resid_post"},
        )
        for layer in (0, 2)
    }
    config = FSRLConfig(layer=[0, 2], sae=saes, task_type="CAUSAL_LM", **settings)
    return helpers.fsrl_model(config=config), saes


def test_several_layers_equal_the_formula_at_each() -> None:
    model, saes = several()
    assert sorted(fsrl_layers(model)) == ["model.layers.0", "model.layers.2"]
    plain = helpers.tiny_model()
    first, last = layers_of(model)
    with (
        helpers.naively_steered(plain, first, saes[0]),
        helpers.naively_steered(plain, last, saes[2]),
    ):
        expected = logits(plain)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    alone = helpers.tiny_model()
    with helpers.naively_steered(alone, first, saes[0]):
        assert not torch.allclose(expected, logits(alone), atol=1e-4)


def test_several_layers_survive_saving(tmp_path: Path) -> None:
    model, _ = several()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["sae"] == {key: {"beside_adapter": f"sae_layer_{key}"} for key in "02"}
    assert set(config["sae_info"]) == {"0", "2"}
    again = PeftModel.from_pretrained(helpers.tiny_model(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_gradients_reach_the_lower_layer_through_the_upper() -> None:
    model, _ = several()
    layers = layers_of(model)
    model(input_ids=helpers.token_ids()).logits.square().mean().backward()
    for layer in layers:
        assert layer.fsrl_adapter["default"].weight.grad.abs().sum() > 0


def test_features_by_layer() -> None:
    model, _ = several(features={0: [1, 2], 2: SOME})
    first, last = layers_of(model)
    assert first.fsrl_sae["default"].feature_index.tolist() == [1, 2]
    assert last.fsrl_sae["default"].feature_index.tolist() == SOME


def test_layers_and_saes_must_match() -> None:
    sae = helpers.tiny_sae()
    with pytest.raises(ValueError, match="Several layers need an SAE each"):
        FSRLConfig(layer=[0, 1], sae=sae)
    with pytest.raises(ValueError, match=r"layers \[0, 1\], found SAEs for \['0', '2'\]"):
        FSRLConfig(layer=[0, 1], sae={0: sae, 2: sae})
    with pytest.raises(ValueError, match="each layer once"):
        FSRLConfig(layer=[1, 1], sae={1: sae})
    assert FSRLConfig(sae={2: "a/b", 0: "c/d"}).layer == [0, 2]


# Hook points


@pytest.mark.parametrize(
    ("family", "hook", "path"),
    [
        ("llama", "blocks.1.hook_resid_post", "model.layers.1"),
        ("llama", "blocks.2.hook_resid_pre", "model.layers.1"),
        ("llama", "blocks.1.hook_mlp_out", "model.layers.1.mlp"),
        ("llama", "blocks.1.hook_attn_out", "model.layers.1.self_attn"),
        ("gpt2", "blocks.1.hook_mlp_out", "transformer.h.1.mlp"),
        ("gpt_neox", "blocks.2.hook_attn_out", "gpt_neox.layers.2.attention"),
        ("gemma2", "blocks.1.hook_mlp_out", "model.layers.1.post_feedforward_layernorm"),
        ("gemma2", "blocks.1.hook_attn_out", "model.layers.1.post_attention_layernorm"),
    ],
)
def test_the_saes_hook_names_the_module(family: str, hook: str, path: str, tmp_path: Path) -> None:
    sae = helpers.tiny_sae(metadata={"hook_name": hook})
    model = helpers.fsrl_model(
        helpers.tiny_model(family), FSRLConfig(sae=sae, task_type="CAUSAL_LM")
    )
    assert list(fsrl_layers(model)) == [path]
    steered = logits(model)
    plain = helpers.tiny_model(family)
    with helpers.naively_steered(plain, helpers.only_layer(model), sae):
        torch.testing.assert_close(steered, logits(plain), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(helpers.tiny_model(family), tmp_path).eval()
    assert torch.equal(logits(again), steered)


def test_target_modules_in_some_layers() -> None:
    sae = helpers.tiny_sae(metadata={})
    model = helpers.fsrl_model(
        sae=sae, target_modules=["mlp"], layers_to_transform=[0, 2], layers_pattern="layers"
    )
    assert sorted(fsrl_layers(model)) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    model = helpers.fsrl_model(
        sae=sae,
        target_modules=r".*\.mlp\.down_proj",
        exclude_modules=["model.layers.1.mlp.down_proj"],
    )
    assert sorted(fsrl_layers(model)) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 2)]


# Mixed batches


def mixed() -> PeftModel:
    """Adapters ``default`` on layer 1 and ``other`` on layer 2."""
    model = helpers.fsrl_model()
    sae = helpers.tiny_sae(seed=5, metadata={"hook_name": "blocks.2.hook_resid_post"})
    model.add_adapter("other", FSRLConfig(sae=sae, task_type="CAUSAL_LM"))
    [layer] = [layer for layer in layers_of(model) if "other" in layer.fsrl_adapter]
    helpers.randomize_adapter(layer, "other", seed=9)
    return model.eval()


def test_each_sample_of_a_mixed_batch_is_steered_by_its_own_adapter() -> None:
    model, ids = mixed(), helpers.token_ids(batch=5)
    names = ["other", "default", "__base__", "default", "other"]
    found = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, ids[row : row + 1])
        else:
            model.set_adapter(name)
            expected = logits(model, ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=1e-6)
    assert not any(layer.batch_adapter_names for layer in layers_of(model))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2}])
def test_generation_with_a_mixed_batch(options: dict[str, Any]) -> None:
    model, ids = mixed(), helpers.token_ids(batch=2)
    options = {"max_new_tokens": 5, "do_sample": "num_return_sequences" in options, **options}
    names = ["other", "__base__"]

    def generate(rows: Tensor, **arguments: Any) -> Tensor:
        torch.manual_seed(0)
        return model.generate(input_ids=rows, **options, **arguments)

    found = generate(ids, adapter_names=names)
    if options["do_sample"]:
        assert found.shape[0] == 4
        return
    model.set_adapter("other")
    width = found.shape[1]
    first = generate(ids[:1])
    assert torch.equal(found[:1, : first.shape[1]], first[:, :width])


def test_mixed_batches_refuse_mistakes() -> None:
    model, ids = mixed(), helpers.token_ids(batch=2)
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        logits(model, ids, adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(model, ids, adapter_names=["default"])
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        logits(model, ids, adapter_names=["default", "other"])


# Top-k


@pytest.mark.parametrize("k", [0, 1, 3, 24, 100, 0.125, 1.0])
def test_top_k_keeps_the_largest(k: float) -> None:
    model = helpers.fsrl_model()
    seen: list[Tensor] = []
    with torch.no_grad(), observe(model, lambda event: seen.append(event.steering_vector)):
        model(input_ids=helpers.token_ids())
        with top_k_steering(model, k):
            model(input_ids=helpers.token_ids())
    whole, kept = seen
    n = min(24, k if isinstance(k, int) else {0.125: 3, 1.0: 24}[k])
    for before, after in zip(whole.flatten(0, 1), kept.flatten(0, 1), strict=True):
        order = sorted(range(24), key=lambda index: -abs(float(before[index])))
        expected = torch.zeros(24)
        expected[order[:n]] = before[order[:n]]
        assert torch.equal(after, expected)


@pytest.mark.parametrize("k", [-1, -0.5, 0.0, 1.5])
def test_top_k_refuses(k: float) -> None:
    with pytest.raises(ValueError, match="share in"), top_k_steering(helpers.fsrl_model(), k):
        pass
