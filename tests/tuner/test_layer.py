"""``FSRLLayer`` against the naive formula: values, gradients, identity, placement."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from helpers import (
    ARCHITECTURES,
    D_IN,
    D_SAE,
    SAE_CASES,
    VARIANTS,
    bare_layer,
    fits,
    naive_steer,
    randomize_adapter,
    tiny_sae,
)
from peft_fsrl import FSRLConfig, FSRLLayer, freeze_sae
from peft_fsrl.functional import ACTIVATIONS
from peft_fsrl.tuner.events import SteeringEvent, TokenStatistics

BANDWIDTH = 0.4
FITTING = [(name, each) for name in ARCHITECTURES for each in ACTIVATIONS if fits(name, each)]
FEATUREWISE = {"standard", "gated", "jumprelu"}
LOWERING = {"soft_threshold", "gain"}


def tokens(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, D_IN, generator=generator, dtype=torch.float64).to(dtype)


def agree(sae: Any, activation: str, non_negative: bool = True) -> None:
    """Compare the layer with the naive formula: output, ``v``, gate, and every gradient."""
    layer = bare_layer(
        sae, activation=activation, jumprelu_bandwidth=BANDWIDTH, non_negative=non_negative
    )
    adapter = layer.fsrl_adapter["default"]
    events: list[SteeringEvent] = []
    layer.observers.append(events.append)

    x = tokens().requires_grad_()
    output = layer(x)
    [event] = events
    naive_x = tokens().requires_grad_()
    naive = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}
    naive = {**dict(adapter.named_buffers()), **naive}
    threshold = naive.get("threshold", naive.get("log_threshold", naive.get("gain")))
    expected, v, gate = naive_steer(
        sae,
        naive_x,
        naive["weight"],
        naive["bias"],
        threshold,
        activation,
        BANDWIDTH,
        non_negative,
    )

    def same(actual: Tensor | None, wanted: Tensor | None) -> None:
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)

    same(event.steering_vector, v)
    same(event.gate, gate) if gate is not None else None
    same(output, expected)
    assert (v != 0).any()
    assert (v == 0).any() or activation == "soft_threshold"
    clamped = (v < 0) & (v < -sae.encode(x))
    assert clamped.any() == (activation in LOWERING)

    # Weights tell tokens, features and directions apart, so that errors cannot cancel in a sum.
    g, g_v = torch.randn_like(x), torch.randn_like(v)
    loss = (output * g).sum() + (event.steering_vector * g_v).sum()
    naive_loss = (expected * g).sum() + (v * g_v).sum()
    if gate is not None:
        assert event.gate is not None
        loss = loss + (event.gate * g_v).sum()
        naive_loss = naive_loss + (gate * g_v).sum()
    loss.backward()
    naive_loss.backward()
    same(x.grad, naive_x.grad)
    for name, parameter in adapter.named_parameters():
        assert naive[name].grad.abs().max() > 0
        same(parameter.grad, naive[name].grad)
    assert all(p.grad is None for p in layer.fsrl_sae["default"].module.parameters())


@pytest.mark.parametrize(
    ("architecture", "normalization", "activation"),
    [(*case, each) for case in SAE_CASES for each in ACTIVATIONS if fits(case[0], each)],
)
def test_agrees_with_the_formula(architecture: str, normalization: str, activation: str) -> None:
    agree(tiny_sae(architecture, normalization, dtype="float64"), activation)


@pytest.mark.parametrize(
    ("variant", "activation"),
    [(name, each) for name in VARIANTS for each in ACTIVATIONS if fits(VARIANTS[name][0], each)],
)
def test_variants_agree_with_the_formula(variant: str, activation: str) -> None:
    architecture, settings = VARIANTS[variant]
    agree(tiny_sae(architecture, dtype="float64", **settings), activation)


@pytest.mark.parametrize(("architecture", "activation"), FITTING)
def test_without_the_clamp_agrees_with_the_formula(architecture: str, activation: str) -> None:
    for normalization in ("none", "layer_norm"):
        agree(tiny_sae(architecture, normalization, dtype="float64"), activation, False)


def test_without_the_clamp_the_encoder_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = bare_layer(tiny_sae(seed=22), non_negative=False)

    def encode(*_: object) -> Tensor:
        raise AssertionError("the encoder was called")

    monkeypatch.setattr(layer.fsrl_sae["default"].module, "encode", encode)
    assert (layer(tokens()) != tokens()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_identity_where_nothing_is_steered(architecture: str, dtype: torch.dtype) -> None:
    for normalization in [n for a, n in SAE_CASES if a == architecture]:
        layer = bare_layer(tiny_sae(architecture, normalization), torch.float32)
        with torch.no_grad():
            layer.fsrl_adapter["default"].threshold.fill_(1e4)
        x = tokens(dtype) * 10
        assert torch.equal(layer(x), x)
        layer.to(dtype)
        assert torch.equal(layer(x), x)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_identity_of_activations_that_only_promote(activation: str) -> None:
    layer = bare_layer(tiny_sae(), torch.float32, activation=activation)
    with torch.no_grad():
        layer.fsrl_adapter["default"].bias.fill_(-1e4)
    x = tokens(torch.float32)
    assert torch.equal(layer(x), x)


def test_only_the_tokens_where_v_is_not_zero_change() -> None:
    layer = bare_layer(tiny_sae("gated", dtype="float64"))
    events: list[SteeringEvent] = []
    layer.observers.append(events.append)
    x, threshold = tokens(), layer.fsrl_adapter["default"].threshold
    with torch.no_grad():
        threshold.zero_()
        layer(x)
        # Half of the tokens have no feature beyond the median of the largest.
        threshold.fill_(events.pop().steering_vector.abs().amax(dim=-1).median())
    output = layer(x)
    silent = (events[0].steering_vector == 0).all(dim=-1)
    assert 0 < silent.sum() < silent.numel()
    assert torch.equal(output[silent], x[silent])
    assert (output[~silent] != x[~silent]).any(dim=-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_dtype_is_close_to_the_formula(activation: str, dtype: torch.dtype) -> None:
    sae = tiny_sae("jumprelu", dtype="float64")
    exact = bare_layer(sae, activation=activation, jumprelu_bandwidth=BANDWIDTH)
    layer = copy.deepcopy(exact).to(dtype)
    x = tokens(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 2e-2}[dtype]
    output = layer(x)
    assert output.dtype == dtype
    error = (output.double() - exact(x.double())).abs()
    # Near a threshold a rounded pre-activation takes the other branch: judge the bulk.
    assert error.median() < tolerance / 4
    assert error.mean() < tolerance


def test_float32_adapter_on_a_bfloat16_module() -> None:
    layer = bare_layer(tiny_sae("topk"), torch.float32)
    x = tokens(torch.bfloat16)
    output = layer(x)
    delta = layer(x.float()) - x.float()
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, x + delta.bfloat16())


@pytest.mark.parametrize(("architecture", "activation"), FITTING)
def test_autocast(architecture: str, activation: str) -> None:
    # What trainers do under `bf16=True`, TRL's default.
    layer = bare_layer(tiny_sae(architecture, "layer_norm"), torch.float32, activation=activation)
    x = tokens(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    output.sum().backward()
    assert output.dtype == torch.float32
    assert (output - layer(x)).abs().mean() < 0.2
    assert all(
        p.grad.isfinite().all() for p in layer.fsrl_adapter.parameters() if p.grad is not None
    )


class Outputs(NamedTuple):
    hidden: Tensor
    other: str


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: x, lambda out: out),
        (lambda x: (x, "other"), lambda out: out[0]),
        (lambda x: [x, "other"], lambda out: out[0]),
        (lambda x: Outputs(x, "other"), lambda out: out.hidden),
    ],
    ids=["tensor", "tuple", "list", "namedtuple"],
)
def test_kinds_of_output(wrap: Any, unwrap: Any) -> None:
    class Wrapping(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wrap(x)

    sae = tiny_sae()
    layer = FSRLLayer(Wrapping(), "wrapping")
    layer.update_layer("default", FSRLConfig(layer=0, sae=sae), freeze_sae(sae))
    randomize_adapter(layer)
    x = tokens(torch.float32)
    output = layer(x)
    assert type(output) is type(wrap(x))
    assert torch.equal(unwrap(output), bare_layer(sae, torch.float32)(x))
    assert isinstance(output, Tensor) or output[1] == "other"


def test_later_hooks_see_the_steered_output() -> None:
    sae, module, seen = tiny_sae(), nn.Identity(), []
    module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    layer = FSRLLayer(module, "identity")
    layer.update_layer("default", FSRLConfig(layer=0, sae=sae), freeze_sae(sae))
    randomize_adapter(layer)
    output = layer(tokens(torch.float32))
    assert seen[0] is output


def test_the_sae_is_no_parameter_and_no_buffer() -> None:
    layer = bare_layer(tiny_sae("gated", "layer_norm"))
    names = {f"fsrl_adapter.default.{name}" for name in ("weight", "bias", "threshold")}
    identity = "fsrl_adapter.default.identity"
    assert set(dict(layer.named_parameters())) == names == set(layer.state_dict()) - {identity}
    assert set(dict(layer.named_buffers())) == {identity}
    assert not any("sae" in name for name, _ in layer.named_modules())


@pytest.mark.parametrize(
    ("activation", "names"),
    [
        ("soft_threshold", {"weight", "bias", "threshold"}),
        ("jumprelu", {"weight", "bias", "log_threshold"}),
        ("relu", {"weight", "bias"}),
    ],
)
def test_parameters_at_the_start(activation: str, names: set[str]) -> None:
    sae = tiny_sae()
    layer = FSRLLayer(nn.Identity(), "identity")
    config = FSRLConfig(
        layer=0, sae=sae, activation=activation, init_scale=0.5, jumprelu_bandwidth=0.25
    )
    layer.update_layer("default", config, freeze_sae(sae))
    parameters = dict(layer.fsrl_adapter["default"].named_parameters())
    assert set(parameters) == names
    assert parameters["weight"].shape == (D_SAE, D_IN)
    assert 0.4 < parameters["weight"].abs().max() <= 0.5
    assert parameters["bias"].tolist() == [0.0] * D_SAE
    start = {"threshold": 0.0, "log_threshold": pytest.approx(torch.tensor(0.25).log().item())}
    for name in names & start.keys():
        assert parameters[name].tolist() == [start[name]] * D_SAE


@pytest.mark.parametrize(("settings", "scale"), [({}, 0.01 / 4), ({"init_threshold": 0.4}, 0.1)])
def test_jumprelu_starts_with_open_gates(settings: dict[str, Any], scale: float) -> None:
    sae = tiny_sae()
    layer = FSRLLayer(nn.Identity(), "identity")
    config = FSRLConfig(layer=0, sae=sae, activation="jumprelu", **settings)
    layer.update_layer("default", config, freeze_sae(sae))
    adapter = layer.fsrl_adapter["default"]
    assert 0.9 * scale < adapter.weight.abs().max() <= scale
    # Residual streams are of this size and larger.
    x = 10 * torch.randn(4, 5, D_IN)
    events: list[SteeringEvent] = []
    layer.observers.append(events.append)
    layer(x).square().sum().backward()
    v = events[0].steering_vector
    assert 0.05 < (v != 0).float().mean() < 0.95
    # Every feature whose gate was open at some token learns.
    assert torch.equal(adapter.weight.grad.abs().sum(1) > 0, (v != 0).flatten(0, 1).any(0))


def started_from_encoder(sae: Any, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A layer as the encoder starts it, and how it steers some tokens."""
    settings = {"activation": "relu", "init_weights": "encoder"} | settings
    model = nn.Sequential(nn.Linear(D_IN, D_IN, dtype=dtype))
    config = FSRLConfig(target_modules=["0"], sae=sae, **settings)
    layer = get_peft_model(model, config).base_model.model[0]
    events: list[SteeringEvent] = []
    layer.observers.append(events.append)
    layer(tokens(dtype))
    return layer, events[0]


def test_the_encoder_start_by_hand() -> None:
    sae = tiny_sae("jumprelu", dtype="float64", d_in=2, d_sae=2)
    values = {
        "W_enc": [[1.0, 0.0], [0.0, 2.0]],
        "b_enc": [0.5, -1.0],
        # Below zero a feature has no activation, whatever its threshold.
        "threshold": [1.0, -3.0],
        "b_dec": [1.0, 1.0],
    }
    for name, value in values.items():
        getattr(sae, name).data.copy_(torch.tensor(value))
    layer = FSRLLayer(nn.Identity(), "identity")
    config = FSRLConfig(layer=0, sae=sae, activation="relu", init_weights="encoder", init_scale=0.1)
    layer.update_layer("default", config, freeze_sae(sae))
    layer.double()
    events: list[SteeringEvent] = []
    layer.observers.append(events.append)
    # Without b_dec: (2, 1) and (0.5, 0.25); pre-activations (2.5, 1) and (1, -0.5).
    layer(torch.tensor([[3.0, 2.0], [1.5, 1.25]], dtype=torch.float64))
    expected = torch.tensor([[0.15, 0.1], [0.0, 0.0]], dtype=torch.float64)
    # The layer made the weights in float32.
    torch.testing.assert_close(events[0].steering_vector, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("features", [None, [1, 5, 20]])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("standard", {}), ("standard", {"apply_b_dec_to_input": False}), ("jumprelu", {})],
)
def test_the_encoder_start_steers_what_is_active(
    architecture: str, settings: dict[str, Any], features: list[int] | None
) -> None:
    sae = tiny_sae(architecture, dtype="float64", **settings)
    _, event = started_from_encoder(sae, features=features)
    f = sae.encode(event.hidden_states)
    threshold = getattr(sae, "threshold", torch.zeros(D_SAE, dtype=torch.float64))
    v = 0.02 * torch.where(f > 0, f - threshold, 0.0)
    v = v if features is None else v[..., features]
    assert (v > 0).any()
    assert (v == 0).any()
    torch.testing.assert_close(event.steering_vector, v, rtol=1e-10, atol=1e-12)


def test_the_encoder_start_of_a_gated_sae_is_its_gate() -> None:
    sae = tiny_sae("gated", dtype="float64")
    _, event = started_from_encoder(sae)
    gate = sae.process_sae_in(event.hidden_states) @ sae.W_enc + sae.b_gate
    torch.testing.assert_close(event.steering_vector, 0.02 * gate.relu())


def test_jumprelu_from_the_encoder_opens_above_its_own_threshold() -> None:
    sae = tiny_sae("jumprelu", dtype="float64")
    _, event = started_from_encoder(sae, activation="jumprelu", init_scale=1.0, init_threshold=0.2)
    excess = sae.encode(event.hidden_states) - sae.threshold
    expected = torch.where(excess > 0.2, excess, 0.0)
    assert ((excess > 0) & (expected == 0)).any()
    torch.testing.assert_close(event.steering_vector, expected)


@pytest.mark.parametrize("features", [None, [1, 5, 20]])
@pytest.mark.parametrize("architecture", sorted(FEATUREWISE))
def test_gains_act_where_the_sae_finds_a_feature(
    architecture: str, features: list[int] | None
) -> None:
    sae = tiny_sae(architecture, dtype="float64")
    layer, event = started_from_encoder(
        sae, activation="gain", init_weights="uniform", features=features, l1_coeff=0.0
    )
    assert not event.steering_vector.any()
    adapter, x = layer.fsrl_adapter["default"], event.hidden_states
    assert [name for name, _ in adapter.named_parameters()] == ["gain"]
    f = sae.encode(x)
    # What the SAE decodes, less its threshold; of a gated SAE, what its gate says.
    excess = f - torch.where(f > 0, getattr(sae, "threshold", torch.zeros(D_SAE)), 0)
    if architecture == "gated":
        excess = (sae.process_sae_in(x) @ sae.W_enc + sae.b_gate).relu()
    if features is not None:
        f, excess = f[..., features], excess[..., features]
    layer(tokens()).square().sum().backward()
    moves = ((excess > 0) & (f > 0)).flatten(0, 1).any(0)
    assert moves.any()
    assert torch.equal(adapter.gain.grad != 0, moves)
    with torch.no_grad():
        adapter.gain.copy_(torch.linspace(-2, 2, len(adapter.gain)))
    events: list[SteeringEvent] = []
    layer.observers.append(events.append)
    layer(tokens())
    torch.testing.assert_close(events[0].steering_vector, adapter.gain * excess)


@pytest.mark.parametrize(
    "settings", [{"activation": "relu", "init_weights": "encoder"}, {"activation": "gain"}]
)
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - FEATUREWISE))
def test_competing_features_have_no_encoder_to_start_from(
    architecture: str, settings: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_IN))
    config = FSRLConfig(target_modules=["0"], sae=tiny_sae(architecture), **settings)
    with pytest.raises(ValueError, match=f"found '{architecture}'.*Use init_weights='uniform'"):
        get_peft_model(model, config)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_do_not_round_the_encoder_of_gains(dtype: torch.dtype) -> None:
    layer, _ = started_from_encoder(tiny_sae("jumprelu"), dtype, activation="gain")
    adapter = layer.fsrl_adapter["default"]
    weight, bias = layer.fsrl_sae["default"].encoder_rows()
    assert torch.equal(adapter.weight, weight)
    assert torch.equal(adapter.bias, bias)
    # Asked for outright, it is narrow like all else.
    layer.to(dtype)
    assert {t.dtype for t in (adapter.weight, adapter.bias, adapter.gain)} == {dtype}
    assert layer(tokens(dtype)).dtype == dtype


@pytest.mark.parametrize("activation", ["relu", "gain"])
def test_the_encoder_start_does_not_hold_the_sae(activation: str) -> None:
    sae = tiny_sae("jumprelu")
    layer, _ = started_from_encoder(sae, torch.float32, activation=activation)
    before = layer.fsrl_sae["default"].module.W_enc.clone()
    with torch.no_grad():
        layer.fsrl_adapter["default"].weight.add_(1.0)
        layer.fsrl_adapter["default"].bias.add_(1.0)
    assert torch.equal(layer.fsrl_sae["default"].module.W_enc, before)


@pytest.mark.parametrize(
    ("activation", "expected"), [("soft_threshold", 0.125), ("jumprelu", -2.0794415)]
)
def test_init_threshold(activation: str, expected: float) -> None:
    sae = tiny_sae()
    layer = FSRLLayer(nn.Identity(), "identity")
    config = FSRLConfig(layer=0, sae=sae, activation=activation, init_threshold=0.125)
    layer.update_layer("default", config, freeze_sae(sae))
    assert layer.fsrl_adapter["default"].threshold_parameter[0].item() == pytest.approx(expected)


def test_follows_to_and_frees_the_old_copy() -> None:
    # A seed of its own: nothing else in the process may hold this SAE.
    layer = bare_layer(tiny_sae("standard", "layer_norm", seed=21), torch.float32)
    gc.collect()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        old = layer.fsrl_sae["default"]
        wrapper, tensor = weakref.ref(old), weakref.ref(old.W_dec)
        del old
        layer.to(dtype)
        assert layer.fsrl_sae["default"].dtype == dtype
        assert layer(tokens(dtype)).dtype == dtype
        assert wrapper() is None
        gc.collect()
        assert tensor() is None


def test_meta_leaves_the_sae_where_it_is() -> None:
    layer = bare_layer(tiny_sae(), torch.float32).to("meta")
    assert layer.fsrl_adapter["default"].weight.is_meta
    assert layer.fsrl_sae["default"].device.type == "cpu"


def test_two_layers_share_one_sae_and_move_apart() -> None:
    first, second = bare_layer(tiny_sae(), torch.float32), bare_layer(tiny_sae(), torch.float32)
    assert first.fsrl_sae["default"] is second.fsrl_sae["default"]
    first.to(torch.bfloat16)
    assert second.fsrl_sae["default"].dtype == torch.float32
    second.to(torch.bfloat16)
    assert first.fsrl_sae["default"] is second.fsrl_sae["default"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_steer_on_their_own(duplicate: Any) -> None:
    layer = bare_layer(tiny_sae("gated", "constant_norm_rescale"), torch.float32)
    x = tokens(torch.float32)
    expected = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), expected)
    assert other.fsrl_sae["default"] is layer.fsrl_sae["default"]
    with torch.no_grad():
        other.fsrl_adapter["default"].bias.add_(1.0)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(other(x), expected)
    other.detach_hook()
    assert torch.equal(other(x), x)
    assert torch.equal(layer(x), expected)


def test_second_adapter_on_a_layer() -> None:
    sae = tiny_sae()
    layer = bare_layer(sae, torch.float32)
    x = tokens(torch.float32)
    expected = layer(x)
    layer.update_layer("second", FSRLConfig(layer=0, sae=sae), freeze_sae(sae))
    assert layer.fsrl_sae["second"] is layer.fsrl_sae["default"]
    with pytest.raises(ValueError, match=r"Only one FSRL adapter.*\['default', 'second'\]"):
        layer.set_adapter(["default", "second"])
    layer.set_adapter("default")
    assert torch.equal(layer(x), expected)
    layer.delete_adapter("second")
    assert set(layer.fsrl_sae) == set(layer.fsrl_adapter) == {"default"}


def test_width_of_the_sae_is_checked() -> None:
    layer = bare_layer(tiny_sae(), torch.float32)
    with pytest.raises(
        ValueError, match=r"'identity' gives activations of width 8.*reads width 16"
    ):
        layer(torch.randn(1, 2, 8))


def test_merging_is_refused() -> None:
    layer = bare_layer(tiny_sae(), torch.float32)
    for method in (layer.merge, layer.unmerge):
        with pytest.raises(ValueError, match="cannot be merged"):
            method()


def test_public_attributes_are_forwarded_and_private_ones_are_not() -> None:
    module = nn.Identity()
    module.attention_type, module._hf_hook = "sliding", "private"
    layer = FSRLLayer(module, "identity")
    assert layer.attention_type == "sliding"
    for name in ("_hf_hook", "absent"):
        with pytest.raises(AttributeError):
            getattr(layer, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_as_wide_as_the_sae_is_kept(activation: str) -> None:
    """Under gradient checkpointing, what the backward pass keeps does not grow with the SAE."""
    layer = bare_layer(tiny_sae(), activation=activation, l1_coeff=0.1).train()
    x = torch.randn(2, 5, D_IN, dtype=torch.float64, requires_grad=True)
    events: list[TokenStatistics] = []
    layer.statistics_observers.append(events.append)
    parameters = {tensor.data_ptr() for tensor in layer.state_dict().values()}

    def largest_kept() -> int:
        sizes = [0]

        def note(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = layer(x)
            (output.sum() + events.pop().l1.sum()).backward()
        return max(sizes)

    wide = 2 * 5 * D_SAE
    assert largest_kept() >= wide
    layer.base_layer.gradient_checkpointing = True
    assert largest_kept() < wide
