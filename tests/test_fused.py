"""``fused.steer`` against ``functional.steer``, loops and finite differences, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from helpers import (
    D_IN,
    SAE_CASES,
    VARIANTS,
    bare_layer,
    fsrl_model,
    only_layer,
    tiny_sae,
    token_ids,
)
from peft_fsrl import FrozenSAE, _tiles, freeze_sae, functional, fused
from peft_fsrl.functional import ACTIVATIONS
from peft_fsrl.steering import SteeringMonitor, observe
from peft_fsrl.tuner import layer

BANDWIDTH = 0.4
D_ODD = 23
# The encoder of `temporal` needs whole sequences: there the plain way is taken.
CASES = [case for case in SAE_CASES if case[0] != "temporal"]
PARAMETERS = ("x", "weight", "bias", "down", "threshold")


@pytest.fixture(params=["one tile", "many tiles"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        for name, value in {"_MOST_TOKENS": 3, "_FEWEST_FEATURES": 5, "_FEWEST_TOKENS": 2}.items():
            monkeypatch.setattr(_tiles, name, value)
        monkeypatch.setattr(_tiles, "_TILE_VALUES", {"cpu": 10})
        monkeypatch.setattr(_tiles, "_WHOLE_VALUES", 10)


def draw(*shape: int, scale: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def tensors(
    shape: tuple[int, ...], d_sae: int = D_ODD, rank: int | None = None, activation: str = "relu"
) -> dict[str, Tensor | None]:
    """The inputs of one application, on whose scale every branch is taken."""
    d_in = shape[-1]
    threshold = {"relu": None, "soft_threshold": draw(d_sae, seed=3)}.get(
        activation, draw(d_sae, seed=3) - 1
    )
    return {
        "x": draw(*shape, scale=1.0, seed=1),
        "weight": draw(d_sae, rank or d_in, seed=2),
        "bias": draw(d_sae, seed=4),
        "down": None if rank is None else draw(rank, d_in, scale=1.0, seed=5),
        "threshold": threshold,
    }


def leaves(values: dict[str, Tensor | None], *frozen: str) -> dict[str, Tensor | None]:
    return {
        name: None if t is None else t.detach().clone().requires_grad_(name not in frozen)
        for name, t in values.items()
    }


def operation(sae: Any, activation: str, recomputes: bool = False, clamps: bool = True) -> Any:
    return fused.Operation(sae, activation, BANDWIDTH, clamps, True, recomputes)


def reference(of: Any, values: dict[str, Tensor | None]) -> fused.Steering:
    """The same by autograd through ``functional``."""
    x, weight, bias, down, threshold = (values[name] for name in PARAMETERS)
    steered = functional.steer(
        x,
        functional.steering_pre(of.sae.process_in(x), weight, bias, down),
        threshold,
        activation=of.activation,
        bandwidth=of.bandwidth,
        encode=(lambda v: of.sae.encode(x)) if of.clamps else None,
        decode_update=lambda update: of.sae.decode_update(update, x),
    )
    v, gate = steered.steering_vector, steered.gate
    gates = None if gate is None else gate.sum(dim=-1)
    wide = v.to(torch.promote_types(v.dtype, torch.float32)).detach()
    l0 = (v != 0).sum(dim=-1).to(wide.dtype)
    return fused.Steering(steered.output, functional.token_l1(v), l0, wide.norm(dim=-1), gates)


def gradients(
    steering: fused.Steering, values: dict[str, Tensor | None], parts: str = "output l1 open_gates"
) -> dict[str, Tensor]:
    outputs = [getattr(steering, name) for name in parts.split()]
    outputs = [y for y in outputs if y is not None]
    weights = [draw(*y.shape, scale=1.0, seed=9).to(y.dtype) for y in outputs]
    asked = {name: t for name, t in values.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(outputs, list(asked.values()), weights, allow_unused=True)
    return {
        name: torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(asked.items(), found, strict=True)
    }


def agree(
    of: Any,
    values: dict[str, Tensor | None],
    *frozen: str,
    parts: str = "output l1 open_gates",
    tolerance: float = 1e-11,
) -> dict[str, Tensor]:
    mine, other = leaves(values, *frozen), leaves(values, *frozen)
    found, expected = fused.steer(of, *mine.values()), reference(of, other)
    for name, actual, wanted in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance, msg=name)
    actual, wanted = gradients(found, mine, parts), gradients(expected, other, parts)
    assert actual.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            actual[name], wanted[name], rtol=tolerance, atol=tolerance, msg=name
        )
        assert actual[name].dtype == wanted[name].dtype
    return wanted


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("architecture", "normalisation"), CASES)
def test_equals_the_reference(
    architecture: str, normalisation: str, activation: str, recomputes: bool
) -> None:
    sae = freeze_sae(tiny_sae(architecture, normalisation, dtype="float64", d_sae=D_ODD))
    values = tensors((2, 5, D_IN), activation=activation)
    clamps = not sae.signed
    wanted = agree(operation(sae, activation, recomputes, clamps), values)
    assert all(g.abs().max() > 0 for g in wanted.values())
    agree(operation(sae, activation, recomputes, clamps), values, "x")


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "temporal" not in name])
def test_equals_the_reference_for_variants(variant: str, activation: str) -> None:
    architecture, settings = VARIANTS[variant]
    sae = freeze_sae(tiny_sae(architecture, dtype="float64", d_sae=D_ODD, **settings))
    for clamps in (not sae.signed, False):
        of = operation(sae, activation, clamps=clamps)
        agree(of, tensors((7, D_IN), activation=activation, rank=3))


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, D_IN), (1, D_IN), (7, D_IN), (2, 0, D_IN), (3, 1, 2, D_IN)])
def test_shapes(
    shape: tuple[int, ...], activation: str, rank: int | None, recomputes: bool
) -> None:
    sae = freeze_sae(tiny_sae("jumprelu", "constant_norm_rescale", dtype="float64", d_sae=D_ODD))
    agree(operation(sae, activation, recomputes), tensors(shape, D_ODD, rank, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_input_that_is_not_contiguous(activation: str) -> None:
    of = operation(freeze_sae(tiny_sae(dtype="float64", d_sae=D_ODD)), activation)
    values = tensors((D_IN, 7, 2), activation=activation)
    x = leaves(values)["x"]
    others = leaves(tensors((7, D_IN), activation=activation))
    del others["x"]
    for turned in (x.permute(2, 1, 0), x.permute(1, 2, 0)[::2, 1:]):
        found = fused.steer(of, turned, *others.values())
        expected = reference(of, {"x": turned, **others})
        torch.testing.assert_close(found.output, expected.output)
        torch.testing.assert_close(
            torch.autograd.grad(found.output.square().sum(), x),
            torch.autograd.grad(expected.output.square().sum(), x),
        )


@pytest.mark.parametrize("parts", ["output", "l1", "open_gates"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_each_output_has_its_own_gradient(parts: str, recomputes: bool) -> None:
    sae = freeze_sae(tiny_sae("gated", "layer_norm", dtype="float64", d_sae=D_ODD))
    for activation in ACTIVATIONS if parts != "open_gates" else ["jumprelu"]:
        values = tensors((7, D_IN), activation=activation)
        agree(operation(sae, activation, recomputes), values, parts=parts)


@pytest.mark.parametrize("frozen", [("x",), ("weight", "x"), ("bias",), ("threshold", "x", "down")])
def test_what_is_frozen_gets_no_gradient(frozen: tuple[str, ...]) -> None:
    of = operation(freeze_sae(tiny_sae(dtype="float64", d_sae=D_ODD)), "soft_threshold")
    agree(of, tensors((7, D_IN), rank=2, activation="soft_threshold"), *frozen)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_by_loops(activation: str) -> None:
    module = tiny_sae("standard", dtype="float64", d_sae=D_ODD)
    values = tensors((3, D_IN), activation=activation)
    found = fused.steer(operation(freeze_sae(module), activation), *values.values())
    W_enc, b_enc, W_dec, b_dec = (
        getattr(module, name).tolist() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    clamped = 0
    for t, x in enumerate(values["x"].tolist()):
        inner = [a - b for a, b in zip(x, b_dec, strict=True)]
        steered, norms = list(x), [0.0, 0.0, 0.0]
        for j in range(D_ODD):
            u = sum(a * w for a, w in zip(inner, values["weight"][j].tolist(), strict=True))
            u += values["bias"][j].item()
            theta = 0.0 if values["threshold"] is None else values["threshold"][j].item()
            if activation == "soft_threshold":
                v = math.copysign(max(abs(u) - max(theta, 0.0), 0.0), u)
            else:
                v = u if u > (math.exp(theta) if activation == "jumprelu" else 0.0) else 0.0
            f = max(0.0, sum(a * W_enc[i][j] for i, a in enumerate(inner)) + b_enc[j])
            clamped += f + v < 0
            change = max(f + v, 0.0) - f
            steered = [a + change * w for a, w in zip(steered, W_dec[j], strict=True)]
            norms = [norms[0] + abs(v), norms[1] + (v != 0), norms[2] + v * v]
        assert found.output[t].tolist() == pytest.approx(steered, rel=1e-12)
        norms[2] = math.sqrt(norms[2])
        assert [found.l1[t], found.l0[t], found.l2[t]] == pytest.approx(norms, rel=1e-12)
    assert (clamped > 0) == (activation == "soft_threshold")


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
@pytest.mark.parametrize("activation", ["soft_threshold", "relu"])
def test_passes_gradcheck(activation: str, normalisation: str, recomputes: bool) -> None:
    sae = freeze_sae(tiny_sae("jumprelu", normalisation, dtype="float64", d_in=3, d_sae=7))
    of = operation(sae, activation, recomputes)
    values = leaves(tensors((4, 3), 7, 2, activation))
    if activation == "soft_threshold":
        # Beyond the kink at zero, where the gradient of a negative threshold is not the function's.
        with torch.no_grad():
            values["threshold"].abs_()
    assert torch.autograd.gradcheck(
        lambda *inputs: fused.steer(of, *inputs)[:2], tuple(values.values())
    )


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("of_the_sae", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 3])
def test_dtypes(
    activation: str, dtype: torch.dtype, of_the_sae: torch.dtype, rank: int | None
) -> None:
    sae = freeze_sae(tiny_sae(dtype="float64", d_sae=D_ODD)).to(torch.device("cpu"), of_the_sae)
    of = operation(sae, activation)
    values = {
        name: None if t is None else t.to(dtype)
        for name, t in tensors((64, D_IN), rank=rank, activation=activation).items()
    }
    mine, other = leaves(values), leaves(values)
    found, wanted = fused.steer(of, *mine.values()), reference(of, other)
    assert found.output.dtype == dtype
    assert found.l1.dtype == found.l0.dtype == found.l2.dtype == torch.float32
    is_narrow = torch.bfloat16 in (dtype, of_the_sae) or dtype == torch.float16
    tolerance = 2e-2 if is_narrow else 1e-5

    def near(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == expected.dtype
        error = (actual.double() - expected.double()).norm()
        assert error <= tolerance * expected.double().norm()

    near(found.output, wanted.output)
    near(found.l1, wanted.l1)
    expected = gradients(wanted, other, "output l1")
    for name, gradient in gradients(found, mine, "output l1").items():
        near(gradient, expected[name])


def test_tiles_do_not_round_the_gradient_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_sae(dtype="float64", d_sae=256)
    with torch.no_grad():
        module.W_dec.mul_(0.1)
        module.b_enc.fill_(20.0)
    values = tensors((64, D_IN), 256, activation="soft_threshold")
    values["bias"].fill_(-60.0)
    narrow = {n: None if t is None else t.bfloat16() for n, t in values.items()}
    g = draw(64, D_IN, scale=1.0, seed=9).bfloat16()
    sae = freeze_sae(module).to(torch.device("cpu"), torch.bfloat16)

    def error(n_features: int) -> float:
        """Of the whole gradient, where everything is clamped and goes through the encoder."""
        monkeypatch.setattr(_tiles, "_FEWEST_FEATURES", n_features)
        monkeypatch.setattr(_tiles, "_TILE_VALUES", {"cpu": 1})
        mine = leaves(narrow)
        output = fused.steer(operation(sae, "soft_threshold"), *mine.values()).output
        [found] = torch.autograd.grad(output, mine["x"], g)
        # x' = x - decode(f) with f linear in x: a matrix of weights as they were rounded.
        W_enc, W_dec = sae.module.W_enc.double(), sae.W_dec.double()
        exact = g.double() - g.double() @ W_dec.T @ W_enc.T
        return float((found.double() - exact).norm() / exact.norm())

    assert error(4) < 1.2 * error(256) < 2**-7


@pytest.mark.parametrize("parts", ["output", "l1", "l0", "l2", "open_gates"])
@pytest.mark.parametrize("shape", [(7, D_IN), (2, 5, D_IN)])
def test_what_is_returned_may_be_changed_in_place(parts: str, shape: tuple[int, ...]) -> None:
    of = operation(freeze_sae(tiny_sae(dtype="float64", d_sae=D_ODD)), "jumprelu")
    values = leaves(tensors(shape, activation="jumprelu"))
    steering = fused.steer(of, *values.values())
    expected = {n: t.detach().clone() for n, t in steering._asdict().items()}
    changed = getattr(steering, parts)
    changed.mul_(2.0)
    expected[parts] *= 2
    assert all(torch.equal(t, expected[n]) for n, t in steering._asdict().items())
    if changed.requires_grad:
        before = getattr(fused.steer(of, *values.values()), parts)
        [gradient] = torch.autograd.grad(changed.sum(), values["weight"])
        [half] = torch.autograd.grad(before.sum(), values["weight"])
        torch.testing.assert_close(gradient, 2 * half)


def test_input_made_under_inference_mode() -> None:
    of = operation(freeze_sae(tiny_sae(dtype="float64", d_sae=D_ODD)), "soft_threshold")
    values = leaves(tensors((7, D_IN), activation="soft_threshold"), "x")
    expected = gradients(fused.steer(of, *values.values()), values)
    with torch.inference_mode():
        values["x"] = values["x"].clone()
    found = gradients(fused.steer(of, *values.values()), values)
    torch.testing.assert_close(found, expected)


def test_meta_device() -> None:
    layer = bare_layer(tiny_sae(), torch.float32).to("meta")
    output = layer(torch.empty(2, 5, D_IN, device="meta"))
    output.sum().backward()
    adapter = layer.fsrl_adapter["default"]
    assert adapter.weight.grad.shape == adapter.weight.shape


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast(activation: str, recomputes: bool) -> None:
    of = operation(freeze_sae(tiny_sae(d_sae=D_ODD)), activation, recomputes)
    values = {
        n: None if t is None else t.float()
        for n, t in tensors((64, D_IN), activation=activation).items()
    }
    mine, other = leaves(values), leaves(values)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = fused.steer(of, *mine.values()), reference(of, other)
    assert found.output.dtype == torch.float32
    torch.testing.assert_close(found.output, wanted.output, rtol=2e-2, atol=2e-2)
    expected = gradients(wanted, other, "output l1")
    for name, gradient in gradients(found, mine, "output l1").items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 2e-2 * expected[name].norm(), name
    exact = fused.steer(of, *values.values()).output
    assert (found.output - exact).abs().max() > 1e-5, "autocast was not on"


def test_nan_and_inf_stay_where_they_are() -> None:
    of = operation(freeze_sae(tiny_sae(d_sae=D_ODD)), "soft_threshold")
    values = {
        n: None if t is None else t.float()
        for n, t in tensors((5, D_IN), activation="soft_threshold").items()
    }
    clean = fused.steer(of, *values.values())
    for bad in (float("nan"), float("inf"), -float("inf")):
        values["x"][2, 3] = bad
        found = fused.steer(of, *values.values())
        assert not found.output[2].isfinite().any()
        assert found.l1.isfinite().tolist() == [True, True, False, True, True]
        others = [0, 1, 3, 4]
        torch.testing.assert_close(found.output[others], clean.output[others])


@pytest.mark.parametrize("activation", ["soft_threshold", "jumprelu"])
@pytest.mark.parametrize("name", ["weight", "bias", "threshold"])
def test_a_parameter_that_is_nan_does_not_pass_unseen(name: str, activation: str) -> None:
    of = operation(freeze_sae(tiny_sae(dtype="float64", d_sae=D_ODD)), activation)
    values = tensors((5, D_IN), activation=activation)
    values[name][3] = float("nan")
    found, expected = fused.steer(of, *values.values()), reference(of, values)
    for each in (found, expected):
        assert each.output.isnan().all()
        assert each.l1.isnan().all()


def test_without_steering_the_output_is_the_input() -> None:
    of = operation(freeze_sae(tiny_sae("gated", d_sae=D_ODD)), "soft_threshold")
    values = {
        n: None if t is None else t.float()
        for n, t in tensors((5, D_IN), activation="soft_threshold").items()
    }
    values["threshold"].fill_(1e4)
    assert torch.equal(fused.steer(of, *values.values()).output, values["x"])


def test_is_deterministic_and_may_be_differentiated_again_from_the_start() -> None:
    of = operation(freeze_sae(tiny_sae(dtype="float64", d_sae=D_ODD)), "soft_threshold")
    values = leaves(tensors((40, D_IN), activation="soft_threshold"))
    results = [fused.steer(of, *values.values()) for _ in range(2)]
    sums = [(each.output.square().sum() + each.l1.sum()) for each in (*results, results[0])]
    asked = [t for t in values.values() if t is not None]
    found = [torch.autograd.grad(each, asked, retain_graph=True) for each in sums]
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_a_second_derivative_is_refused() -> None:
    of = operation(freeze_sae(tiny_sae(dtype="float64", d_sae=D_ODD)), "soft_threshold")
    values = leaves(tensors((4, D_IN), activation="soft_threshold"))
    output = fused.steer(of, *values.values()).output
    [gradient] = torch.autograd.grad(output.square().sum(), values["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(("architecture", "normalisation"), SAE_CASES)
def test_some_features_of_an_encoder(architecture: str, normalisation: str) -> None:
    for features in (None, [1, 2, 5, 7, 11, 13, 17]):
        sae = freeze_sae(tiny_sae(architecture, normalisation, dtype="float64"))
        sae = sae if features is None else sae.restrict(features)
        x = draw(2, 5, D_IN, scale=1.0)
        torch.testing.assert_close(sae.encode_slice(x, slice(2, 5)), sae.encode(x)[..., 2:5])


# --- what it costs --------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts matrix products and their operations, and notes the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.flops, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.products += 1
            self.flops += count(*args, **{**(kwargs or {}), "out_val": result})
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def cost(step: Callable[[], Any]) -> tuple[float, int, Any]:
    """Floating-point operations, number of matrix products, and what the step returned."""
    with Watch() as watch:
        result = step()
    return watch.flops, watch.products, result


@pytest.mark.parametrize(
    ("activation", "recomputes", "x_needs", "forward", "backward"),
    [
        ("soft_threshold", False, False, 3, 2),
        ("relu", False, False, 2, 2),
        ("jumprelu", False, False, 2, 2),
        ("soft_threshold", True, False, 3, 4),
        ("relu", True, False, 2, 3),
        # Through the adapter, and through the encoder, which is asked once more.
        ("soft_threshold", False, True, 3, 5),
        ("relu", False, True, 2, 3),
    ],
)
def test_matrix_products(
    activation: str, recomputes: bool, x_needs: bool, forward: int, backward: int
) -> None:
    of = operation(freeze_sae(tiny_sae("jumprelu", d_sae=D_ODD)), activation, recomputes)
    values = tensors((7, D_IN), activation=activation)
    values = leaves({n: None if t is None else t.float() for n, t in values.items()})
    values["x"].requires_grad_(x_needs)
    one = 2 * 7 * D_IN * D_ODD
    flops, products, steering = cost(lambda: fused.steer(of, *values.values()))
    assert (flops, products) == (forward * one, forward)
    flops, products, _ = cost(lambda: gradients(steering, values))
    assert (flops, products) == (backward * one, backward)


@pytest.mark.usefixtures("tiling")
def test_tiles_cost_no_operation_more() -> None:
    of = operation(freeze_sae(tiny_sae("jumprelu", d_sae=D_ODD)), "soft_threshold")
    values = leaves(tensors((7, D_IN), activation="soft_threshold"), "x")
    flops, _, steering = cost(lambda: fused.steer(of, *values.values()))
    assert flops == 3 * 2 * 7 * D_IN * D_ODD
    flops, _, _ = cost(lambda: gradients(steering, values))
    assert flops == 2 * 2 * 7 * D_IN * D_ODD


def kept_bytes(step: Callable[[], Any], values: dict[str, Tensor | None], sae: FrozenSAE) -> int:
    """Bytes kept for the backward pass, but for parameters and the SAE."""
    known = [t for n, t in values.items() if n != "x" and t is not None]
    known += list(sae.module.parameters())
    ignored = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()
    assert result is not None
    return sum(size for place, size in kept.items() if place not in ignored)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("d_sae", [64, 192])
def test_bytes_kept_for_the_backward_pass(activation: str, d_sae: int) -> None:
    sae = freeze_sae(tiny_sae("jumprelu", d_sae=d_sae))
    values = tensors((32, D_IN), d_sae, activation=activation)
    values = leaves({n: None if t is None else t.float() for n, t in values.items()}, "x")

    def kept(recomputes: bool) -> int:
        of = operation(sae, activation, recomputes)
        return kept_bytes(lambda: fused.steer(of, *values.values()), values, sae)

    x_bytes = 32 * D_IN * 4
    assert kept(False) == x_bytes + 32 * d_sae
    assert kept(True) == x_bytes
    plain = kept_bytes(lambda: reference(operation(sae, activation), values), values, sae)
    # One mask of 4 bytes is all that autograd itself keeps for a relu.
    assert plain - x_bytes >= (4 if activation == "relu" else 6) * 32 * d_sae


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_recomputing_makes_no_large_tensor(architecture: str, activation: str) -> None:
    sae = freeze_sae(tiny_sae(architecture, d_sae=1024))
    first, second = (largest_tensor(sae, n, activation) for n in (8192, 16384))
    assert first == second < 8192 * 1024


def test_recomputing_with_some_features_of_an_encoder_that_gives_all() -> None:
    sae = freeze_sae(tiny_sae("topk", d_sae=1024)).restrict([3, 5, 8])
    first, second = (largest_tensor(sae, n, "soft_threshold") for n in (8192, 16384))
    assert first == second < 8192 * 1024


def largest_tensor(sae: FrozenSAE, n_tokens: int, activation: str) -> int:
    """Elements of the largest tensor that a step makes which keeps nothing as wide as the SAE."""
    values = tensors((n_tokens, D_IN), sae.n_features, activation=activation)
    values = leaves({n: None if t is None else t.float() for n, t in values.items()}, "x")
    with Watch() as watch:
        gradients(fused.steer(operation(sae, activation, True), *values.values()), values)
    return watch.largest


# --- the layer ------------------------------------------------------------------------------------


def forbid(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("not this way")

    monkeypatch.setattr(module, "steer", refuse)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_training_step_of_a_model_is_as_by_the_reference(
    activation: str, recomputes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for module in (functional, fused):
        model = fsrl_model(
            activation=activation, jumprelu_bandwidth=BANDWIDTH, l1_coeff=0.1
        ).train()
        only_layer(model).recomputes_alone = recomputes
        records: list[Any] = []
        with monkeypatch.context() as patch, SteeringMonitor(model, records.append):
            forbid(patch, module)
            if module is fused:
                patch.setattr(layer, "is_traced", lambda: True)
            loss = model(input_ids=token_ids()).logits.square().mean()
            [statistics] = records[0].tokens
            (loss + 0.1 * statistics.l1.mean()).backward()
        gradient = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss, statistics, gradient))
    (loss, found, gradient), (expected_loss, expected, expected_gradient) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name in ("l0", "l1", "l2", "gate", "nonfinite"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert len(gradient) >= 2
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_what_needs_the_vector_takes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, fused)
    layer = bare_layer(tiny_sae(dtype="float64"))
    x = draw(2, 5, D_IN)
    seen: list[Tensor] = []
    layer.observers.append(lambda event: seen.append(event.steering_vector))
    layer(x)
    assert seen[0].requires_grad
    layer.observers.clear()
    layer.edits.append(lambda v, sae: v * 2)
    layer(x)
    layer.edits.clear()
    layer.requires_grad_(False)
    [gradient] = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)
    assert gradient.requires_grad
    layer.requires_grad_(True)
    with pytest.raises(AssertionError, match="not this way"):
        layer(x)
    jacobian = torch.func.jacrev(lambda x: layer(x))(x.detach())
    assert jacobian.shape == (*x.shape, *x.shape)


# Raised inside torch when it first meets a dual tensor.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("with_graph", [False, True])
def test_forward_mode_derivatives(trains: bool, with_graph: bool) -> None:
    layer = bare_layer(tiny_sae(dtype="float64")).requires_grad_(trains)
    x, tangent = draw(2, 50, D_IN), draw(2, 50, D_IN, seed=8)
    with torch.set_grad_enabled(with_graph), forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, tangent))
        found = forward_ad.unpack_dual(dual).tangent.detach()
    with torch.no_grad():
        expected = (layer(x + 1e-6 * tangent) - layer(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_observer_sees_what_the_model_does_without_one() -> None:
    model, seen = fsrl_model(), []
    expected = model(input_ids=token_ids()).logits
    with observe(model, lambda event: seen.append(event.steering_vector)):
        found = model(input_ids=token_ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1
