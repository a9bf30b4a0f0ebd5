"""``prune``: what is dropped, what stays the same, and whether the stated cost is the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import helpers
from peft_fsrl import FSRLConfig, FSRLLayer, prune
from peft_fsrl.steering import ablate_features, adapter_configs, observe

FAMILIES = ["llama", "gemma2", "gpt2", "gptj"]


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Batches whose second row is padded on the left by two tokens."""
    made = []
    for seed in range(count):
        ids = helpers.token_ids(seed=seed)
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def silence(layer: FSRLLayer, features: list[int]) -> None:
    """Put the thresholds of some features out of reach."""
    with torch.no_grad():
        layer.fsrl_adapter["default"].threshold[features] = 1e6


def used_by_hand(model: Any, data: list[dict[str, Tensor]]) -> dict[int, int]:
    """How often each feature is steered, token by token, padding left out."""
    found: dict[int, int] = {}
    for batch in data:
        vectors: list[Tensor] = []
        with torch.no_grad(), observe(model, lambda e, keep=vectors: keep.append(e)):
            model(**batch)
        [event] = vectors
        for row in range(2):
            for token in range(7):
                if batch["attention_mask"][row, token] == 0:
                    continue
                for place, value in enumerate(event.steering_vector[row, token].tolist()):
                    feature = int(event.sae.feature_index[place])
                    found[feature] = found.get(feature, 0) + (value != 0)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_what_is_never_used_goes_and_nothing_changes(family: str, architecture: str) -> None:
    sae = helpers.tiny_sae(architecture)
    model = helpers.fsrl_model(helpers.tiny_model(family), sae=sae)
    layer = helpers.only_layer(model)
    silence(layer, [0, 3, 23])
    data = batches()
    use = used_by_hand(model, data)
    expected = sorted(feature for feature, count in use.items() if count)
    assert not {0, 3, 23} & set(expected)
    assert len(expected) > 5
    with torch.no_grad():
        before = [model(**batch).logits for batch in data]
    report = prune(model, data, show_progress=False)
    config = adapter_configs(model)["default"]
    assert config.features == expected
    assert layer.fsrl_sae["default"].feature_index.tolist() == expected
    assert report.features_before == {layer.layer_name: 24}
    assert report.features_after == {layer.layer_name: len(expected)}
    # A row is 16 weights, a bias and a threshold.
    assert (report.parameters_before, report.parameters_after) == (24 * 18, len(expected) * 18)
    assert report.tokens == 3 * 12
    assert report.dropped_steering == pytest.approx(0, abs=1e-12)
    assert report.kl_max == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for batch, logits in zip(data, before, strict=True):
            torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-5)


def test_gains_of_zero_go_with_their_encoder(tmp_path: Path) -> None:
    model = helpers.fsrl_model(sae=helpers.tiny_sae("jumprelu"), activation="gain")
    adapter = helpers.only_layer(model).fsrl_adapter["default"]
    with torch.no_grad():
        adapter.gain[:20] = 0
    rows, data = adapter.weight.clone(), batches()
    used = [feature for feature, count in used_by_hand(model, data).items() if count]
    assert used
    assert set(used) <= {20, 21, 22}
    ids = helpers.token_ids()
    before = model(ids).logits
    report = prune(model, data, show_progress=False)
    assert (report.parameters_before, report.parameters_after) == (24, len(used))
    assert torch.equal(adapter.weight, rows[sorted(used)])
    assert [name for name, _ in adapter.named_parameters()] == ["gain"]
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(helpers.tiny_model(), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_rare_features_go_at_the_cost_that_is_stated() -> None:
    model = helpers.fsrl_model().double()
    with torch.no_grad():
        # A random model's activations are too small for tokens to be steered differently.
        model.get_input_embeddings().weight *= 50
    data = batches()
    use = used_by_hand(model, data)
    # Well inside the range of frequencies, and not at one of them.
    limit = sorted(use.values())[12] + 0.5
    kept = sorted(feature for feature, count in use.items() if count > limit)
    dropped = sorted(set(range(24)) - set(kept))
    assert 0 < len(kept) < sum(count > 0 for count in use.values())
    vectors: list[Tensor] = []
    divergences = []
    with torch.no_grad():
        for batch in data:
            real = batch["attention_mask"].bool()
            with observe(model, lambda e, real=real: vectors.append(e.steering_vector[real])):
                p = model(**batch).logits[real].softmax(-1)
            with ablate_features(model, dropped):
                q = model(**batch).logits[real].softmax(-1)
            divergences.append((p * (p / q).log()).sum(-1))
    size = torch.cat(vectors).abs().sum(0)
    expected = torch.cat(divergences)
    report = prune(model, data, max_frequency=limit / 36, show_progress=False)
    assert adapter_configs(model)["default"].features == kept
    assert report.dropped_steering == pytest.approx(float(size[dropped].sum() / size.sum()))
    assert report.kl_mean == pytest.approx(float(expected.mean()), rel=1e-6)
    assert report.kl_max == pytest.approx(float(expected.max()), rel=1e-6)
    assert f"24 -> {len(kept)}" in str(report)
    # And the model that is left is the one whose cost was measured.
    with torch.no_grad():
        real = data[-1]["attention_mask"].bool()
        after = model(**data[-1]).logits[real].softmax(-1)
    torch.testing.assert_close(after, q)


def test_a_pruned_adapter_is_saved_small_and_loads(tmp_path: Path) -> None:
    model = helpers.fsrl_model()
    silence(helpers.only_layer(model), list(range(4, 24)))
    prune(model, batches(), show_progress=False)
    model.save_pretrained(tmp_path)
    features = json.loads((tmp_path / "adapter_config.json").read_text())["features"]
    assert features == adapter_configs(model)["default"].features
    assert len(features) <= 4
    shapes = {tuple(t.shape) for t in load_file(tmp_path / "adapter_model.safetensors").values()}
    assert shapes == {(len(features), 16), (len(features),), (32,)}
    again = PeftModel.from_pretrained(helpers.tiny_model(), tmp_path).eval()
    ids = helpers.token_ids()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_it_trains_on_and_keeps_its_state() -> None:
    model = helpers.fsrl_model(exclude_features=[1, 2], rank=2).train()
    layer = helpers.only_layer(model)
    silence(layer, [0, 5])
    prune(model, batches(), show_progress=False)
    assert model.training
    assert adapter_configs(model)["default"].exclude_features is None
    adapter = layer.fsrl_adapter["default"]
    assert adapter.down.shape == (2, 16)
    ids = helpers.token_ids()
    model(ids, labels=ids).loss.backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
    # Place 5 of the 22 steered features is feature 7.
    assert not {0, 1, 2, 7} & set(adapter_configs(model)["default"].features)


def test_several_layers_are_pruned_apart() -> None:
    saes = {0: helpers.tiny_sae(metadata={}), 2: helpers.tiny_sae("topk", metadata={}, seed=1)}
    model = helpers.fsrl_model(sae=saes, layer=[0, 2])
    first, second = (m for m in model.modules() if isinstance(m, FSRLLayer))
    silence(first, list(range(0, 12)))
    silence(second, list(range(12, 24)))
    prune(model, batches(), show_progress=False)
    features = adapter_configs(model)["default"].features
    assert set(features) == {"0", "2"}
    assert features["0"][0] >= 12 > features["2"][-1]


def test_modules_that_share_an_sae_keep_what_any_of_them_uses() -> None:
    model = helpers.fsrl_model(target_modules=["layers.0", "layers.2"])
    first, second = (m for m in model.modules() if isinstance(m, FSRLLayer))
    silence(first, list(range(0, 8)))
    silence(second, list(range(4, 24)))
    report = prune(model, batches(), show_progress=False)
    features = adapter_configs(model)["default"].features
    assert features[0] < 4
    assert not set(range(4, 8)) & set(features)
    assert features[-1] >= 8
    assert set(report.features_after.values()) == {len(features)}


def test_only_the_named_adapter_is_pruned() -> None:
    model = helpers.fsrl_model()
    sae = helpers.tiny_sae(seed=4)
    model.add_adapter("second", FSRLConfig(layer=1, sae=sae, task_type="CAUSAL_LM"))
    layer = helpers.only_layer(model)
    with pytest.raises(ValueError, match=r"an active FSRL adapter, one of \['default'\]"):
        prune(model, batches(), adapter_name="second", show_progress=False)
    silence(layer, [0])
    prune(model, batches(), show_progress=False)
    assert layer.fsrl_sae["second"].n_features == 24
    assert layer.fsrl_sae["default"].n_features < 24


def test_adapters_that_were_made_from_one_config(tmp_path: Path) -> None:
    config = FSRLConfig(layer=1, sae=helpers.tiny_sae(), init_scale=0.3, task_type="CAUSAL_LM")
    model = helpers.fsrl_model(config=config)
    model.add_adapter("second", config)
    silence(helpers.only_layer(model), [0])
    prune(model, batches(), show_progress=False)
    assert 0 not in adapter_configs(model)["default"].features
    assert config.features is None
    model.set_adapter("second")
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        model.set_adapter(name)
        again = PeftModel.from_pretrained(helpers.tiny_model(), folder).eval()
        ids = helpers.token_ids()
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_refusals_leave_the_adapter_alone() -> None:
    model = helpers.fsrl_model()
    layer = helpers.only_layer(model)
    with pytest.raises(TypeError, match=r"iterated twice.*got an iterator"):
        prune(model, iter(batches()), show_progress=False)
    with pytest.raises(ValueError, match="at least one token"):
        prune(model, [], show_progress=False)
    with pytest.raises(ValueError, match="No feature would remain"):
        prune(model, batches(), max_frequency=1.0, show_progress=False)
    silence(layer, list(range(24)))
    with pytest.raises(ValueError, match="No feature would remain"):
        prune(model, batches(), show_progress=False)
    assert layer.fsrl_sae["default"].n_features == 24
    assert adapter_configs(model)["default"].features is None
