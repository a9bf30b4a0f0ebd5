"""Freezing, sharing, identity and loading of SAEs, against SAELens itself."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from helpers import (
    ARCHITECTURES,
    D_IN,
    D_SAE,
    SAE_CASES,
    TRANSCODERS,
    VARIANTS,
    tiny_sae,
    tiny_transcoder,
)
from peft_fsrl import freeze_sae, load_sae
from peft_fsrl.sae.frozen import FrozenSAE, compute_fingerprint
from peft_fsrl.sae.loading import parse_hook_layer, parse_reference

CPU = torch.device("cpu")


def tokens(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 5, D_IN, dtype=dtype)


@pytest.mark.parametrize(("architecture", "normalization"), SAE_CASES)
def test_agrees_with_sae_lens(architecture: str, normalization: str) -> None:
    sae = tiny_sae(architecture, normalization, dtype="float64")
    frozen = freeze_sae(sae)
    x = tokens()
    f = sae.encode(x)
    reconstruction = sae.decode(f)
    change = torch.randn_like(f)
    sae.encode(x)
    expected = sae.decode(f + change) - reconstruction
    assert torch.equal(frozen.process_in(x), sae.process_sae_in(x))
    torch.testing.assert_close(frozen.encode(x), f, rtol=1e-12, atol=1e-12)
    assert (f != 0).any()
    torch.testing.assert_close(frozen.decode_update(change, x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sign_of_feature_activations(architecture: str) -> None:
    sae = tiny_sae(architecture)
    assert freeze_sae(sae).signed == bool((sae.encode(tokens(torch.float32)) < 0).any())


def test_only_some_architectures_read_other_tokens() -> None:
    x = tokens(torch.float32)
    for architecture in ARCHITECTURES:
        sae = tiny_sae(architecture)
        alone = torch.cat([sae.encode(x[:, [t]]) for t in range(x.shape[1])], dim=1)
        independent = torch.allclose(alone, sae.encode(x), atol=1e-5)
        assert freeze_sae(sae).contextual != independent, architecture


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders_are_refused(architecture: str) -> None:
    with pytest.raises(TypeError, match=r"reads and writes one hook point.*Use an SAE"):
        freeze_sae(tiny_transcoder(architecture))


@pytest.mark.parametrize("architecture", sorted(SAE_TRAINING_CLASS_REGISTRY))
def test_training_saes_are_refused(architecture: str) -> None:
    training_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    settings: dict[str, Any] = {}
    if "matryoshka" in architecture:
        settings["matryoshka_widths"] = [4, D_SAE]
    if "topk" in architecture:
        settings["k"] = 4
    if architecture == "matching_pursuit":
        settings["decoder_init_norm"] = 1.0
    sae = training_class(config_class(d_in=D_IN, d_sae=D_SAE, **settings))
    with pytest.raises(TypeError, match=r"inference SAE.*save_inference_model"):
        freeze_sae(sae)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, {"W_dec": 1}])
def test_other_things_are_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected a sae_lens\.SAE, got"):
        freeze_sae(thing)


def test_hook_z_reshaping_is_undone() -> None:
    sae = tiny_sae(
        dtype="float64",
        reshape_activations="hook_z",
        metadata={"hook_name": "blocks.1.attn.hook_z"},
    )
    x = tokens()
    heads = x.reshape(2, 5, 4, D_IN // 4)
    torch.testing.assert_close(freeze_sae(sae).encode(x), sae.encode(heads), rtol=0, atol=1e-5)


def test_nothing_is_trainable() -> None:
    frozen = freeze_sae(tiny_sae())
    assert not any(p.requires_grad for p in frozen.module.parameters())
    assert not frozen.module.training


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_no_graph_is_kept(normalization: str) -> None:
    frozen = freeze_sae(tiny_sae("standard", normalization))
    x = tokens(torch.float32).requires_grad_()
    frozen.process_in(x)
    frozen.encode(x)
    kept = [value for value in vars(frozen.module).values() if isinstance(value, torch.Tensor)]
    assert kept == []


def test_same_object_for_the_same_sae() -> None:
    first, second = freeze_sae(tiny_sae()), freeze_sae(tiny_sae())
    assert first is second
    assert freeze_sae(tiny_sae(seed=1)) is not first
    assert first.to(CPU, torch.bfloat16) is second.to(CPU, torch.bfloat16)
    assert first.to(CPU, torch.float32) is first


def test_an_sae_with_other_metadata_keeps_its_own() -> None:
    first = freeze_sae(tiny_sae(metadata={"hook_name": "blocks.1.hook_resid_post"}))
    second = freeze_sae(tiny_sae(metadata={"hook_name": "blocks.2.hook_resid_post"}))
    assert first.info.hook_name == "blocks.1.hook_resid_post"
    assert second.info.hook_name == "blocks.2.hook_resid_post"
    assert first.info.fingerprint == second.info.fingerprint


def test_rounded_tensors_are_not_taken_for_the_original() -> None:
    original = freeze_sae(tiny_sae(seed=12))
    W_dec = original.W_dec.clone()
    rounded = original.to(CPU, torch.bfloat16).to(CPU, torch.float32)
    assert torch.equal(rounded.W_dec, W_dec.bfloat16().float())
    del original, rounded
    assert torch.equal(freeze_sae(tiny_sae(seed=12)).W_dec, W_dec)


def test_widening_and_back_is_the_original() -> None:
    original = freeze_sae(tiny_sae())
    assert original.to(CPU, torch.float64).to(CPU, torch.float32) is original


def test_the_live_sae_is_left_as_it_was() -> None:
    sae = tiny_sae("standard", "layer_norm").train()
    freeze_sae(sae).to(CPU, torch.bfloat16)
    assert sae.training
    assert sae.W_dec.requires_grad
    assert sae.W_dec.dtype == torch.float32
    assert sae.cfg.device == "cpu"


def test_old_copies_are_freed_without_the_garbage_collector() -> None:
    frozen = freeze_sae(tiny_sae("standard", "layer_norm"))
    low = frozen.to(CPU, torch.bfloat16)
    tensor, wrapper = weakref.ref(low.W_dec), weakref.ref(low)
    del low
    assert wrapper() is None
    gc.collect()
    assert tensor() is None


def test_copies_share_and_pickles_do_not_duplicate() -> None:
    frozen = freeze_sae(tiny_sae("gated", "layer_norm"))
    assert copy.copy(frozen) is copy.deepcopy(frozen) is frozen
    data = pickle.dumps(frozen)
    assert pickle.loads(data) is frozen
    x = tokens(torch.float32)
    expected, info = frozen.encode(x), frozen.info
    del frozen
    again = pickle.loads(data)
    assert again.info == info
    assert torch.equal(again.encode(x), expected)


def test_made_under_inference_mode_can_still_train() -> None:
    with torch.inference_mode():
        frozen = freeze_sae(tiny_sae(seed=11))
        low = frozen.to(CPU, torch.float64)
    x = tokens(torch.float32).requires_grad_()
    frozen.encode(x).sum().backward()
    low.encode(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fingerprint_sees_every_tensor(architecture: str) -> None:
    reference = compute_fingerprint(tiny_sae(architecture))
    for name in tiny_sae(architecture).state_dict():
        for position in (0, -1):
            sae = tiny_sae(architecture)
            element = sae.state_dict()[name].view(-1)
            element[position] = torch.nextafter(element[position], torch.tensor(9.0))
            assert compute_fingerprint(sae) != reference, name


def test_fingerprint_sees_settings() -> None:
    saes = [
        tiny_sae("topk"),
        tiny_sae("topk", k=7),
        tiny_sae("topk", rescale_acts_by_decoder_norm=True),
        tiny_sae("topk", apply_b_dec_to_input=False),
        tiny_sae("abstopk"),
        *(tiny_sae("topk", n) for a, n in SAE_CASES if a == "topk" and n != "none"),
    ]
    assert len({compute_fingerprint(sae) for sae in saes}) == len(saes)
    pursuits = [
        tiny_sae("matching_pursuit"),
        tiny_sae("matching_pursuit", max_iterations=5),
        tiny_sae("matching_pursuit", residual_threshold=0.5),
        tiny_sae("matching_pursuit", stop_on_duplicate_support=False),
    ]
    assert len({compute_fingerprint(sae) for sae in pursuits}) == len(pursuits)
    temporal = [
        tiny_sae("temporal"),
        tiny_sae("temporal", n_heads=1),
        tiny_sae("temporal", kval_topk=5),
        tiny_sae("temporal", sae_diff_type="relu"),
        tiny_sae("temporal", "constant_scalar_rescale"),
        tiny_sae("temporal", "constant_scalar_rescale", activation_normalization_factor=0.5),
    ]
    assert len({compute_fingerprint(sae) for sae in temporal}) == len(temporal)


def test_fingerprint_does_not_see_where_the_sae_is_or_was_trained() -> None:
    sae, other = tiny_sae(), tiny_sae(metadata={"hook_name": "elsewhere", "model_name": "m"})
    other.cfg.device = "cuda:3"
    assert compute_fingerprint(sae) == compute_fingerprint(other)


@pytest.mark.parametrize(("architecture", "normalization"), SAE_CASES)
def test_saved_and_loaded(architecture: str, normalization: str, tmp_path: Path) -> None:
    sae = tiny_sae(architecture, normalization)
    frozen = freeze_sae(sae)
    info, x = frozen.info, tokens(torch.float32)
    expected = frozen.encode(x)
    sae.save_model(tmp_path / "theirs")
    frozen.save(tmp_path / "ours")
    del frozen
    for folder in ("theirs", "ours"):
        loaded = load_sae(str(tmp_path / folder))
        assert loaded.info == info
        assert torch.equal(loaded.encode(x), expected)
        del loaded


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_survive_saving(variant: str, tmp_path: Path) -> None:
    architecture, settings = VARIANTS[variant]
    sae = tiny_sae(architecture, **settings)
    freeze_sae(sae).save(tmp_path)
    assert compute_fingerprint(SAE.load_from_disk(tmp_path)) == compute_fingerprint(sae)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_survive_saving(dtype: str, tmp_path: Path) -> None:
    frozen = freeze_sae(tiny_sae(dtype=dtype))
    frozen.save(tmp_path)
    fingerprint, W_dec = frozen.info.fingerprint, frozen.W_dec.clone()
    assert frozen.info.dtype == dtype
    del frozen
    loaded = load_sae(str(tmp_path))
    assert loaded.info.fingerprint == fingerprint
    assert torch.equal(loaded.W_dec, W_dec)


def test_sae_moved_by_torch_and_not_by_sae_lens(tmp_path: Path) -> None:
    # `module.double()` goes past SAELens's own `to`, so its config keeps the old dtype.
    sae = tiny_sae().double()
    freeze_sae(sae).save(tmp_path)
    assert load_sae(str(tmp_path)).dtype == torch.float64


@pytest.mark.parametrize("reference", [str, Path, lambda path: {"path": str(path)}])
def test_load_folder(reference: Any, tmp_path: Path) -> None:
    sae = tiny_sae()
    sae.save_model(tmp_path / "an sae")
    loaded = load_sae(reference(tmp_path / "an sae"))
    assert isinstance(loaded, FrozenSAE)
    assert loaded.info.fingerprint == compute_fingerprint(sae)


def test_load_folder_without_an_sae(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"SAELens's format.*found no cfg\.json"):
        load_sae(str(tmp_path))


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        ("gemma-scope-2b-pt-rez", r"neither a folder.*Closest known: \[.*'gemma-scope-2b-pt-res'"),
        ("gemma-scope-2b-pt-rez/layer_12", r"Closest known: \[.*'gemma-scope-2b-pt-res'"),
        ("./no/such/folder", "neither a folder that exists"),
        ("/no/such/folder", "neither a folder that exists"),
        ("", "neither a folder that exists"),
        (
            {"release": "gemma-scope-2b-pt-rez", "sae_id": "a"},
            r"Unknown SAE release 'gemma-scope-2b-pt-rez'\. Closest known: ",
        ),
        (
            "gemma-scope-2b-pt-res/layer_12/width_65k/average_l0_73",
            r"Unknown sae_id .*average_l0_73.*Closest known: .*'layer_12/width_65k/average_l0_72'",
        ),
        ({"release": "gpt2-small-res-jb"}, r"'release' and 'sae_id'; got \['release'\]"),
        ({}, "must have the key 'path'"),
    ],
)
def test_unknown_references(reference: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load_sae(reference)


def test_every_registered_sae_parses_to_itself() -> None:
    wrong = [
        (release, sae_id)
        for release, entry in get_pretrained_saes_directory().items()
        for sae_id in entry.saes_map
        if parse_reference(f"{release}/{sae_id}") != {"release": release, "sae_id": sae_id}
    ]
    assert wrong == []


def test_hub_repository_and_mapping() -> None:
    assert parse_reference("user/repo/deep/id") == {"release": "user/repo", "sae_id": "deep/id"}
    mapping = {"release": "a", "sae_id": "b"}
    assert parse_reference(mapping) == mapping
    assert parse_reference({"path": "anywhere"}) == {"path": "anywhere"}


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [
        ("blocks.12.hook_resid_post", 12),
        ("blocks.13.hook_resid_pre", 12),
        ("blocks.0.hook_resid_post", 0),
        ("model.layers.7", 7),
        ("layers.7", 7),
        ("transformer.h.3", 3),
        ("blocks.12.hook_resid_mid", None),
        ("blocks.12.hook_mlp_out", None),
        ("blocks.12.attn.hook_z", None),
        ("model.layers.7.mlp", None),
        ("blocks.0.hook_resid_pre", None),
        ("", None),
        (None, None),
    ],
)
def test_parse_hook_layer(hook_name: str | None, layer: int | None) -> None:
    assert parse_hook_layer(hook_name) == layer
