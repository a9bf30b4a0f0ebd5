"""The mathematics against loops, hand-derived gradients and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peft_fsrl import functional


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_soft_threshold_by_cases(shape: tuple[int, ...]) -> None:
    u, theta = random(*shape), random(5, scale=0.5).abs()
    expected = torch.zeros_like(u)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)):
        position = tuple(index.tolist())
        value, t = u[position].item(), theta[position[-1]].item()
        if value > t:
            expected[position] = value - t
        elif value < -t:
            expected[position] = value + t
    torch.testing.assert_close(functional.soft_threshold(u, theta), expected, rtol=1e-12, atol=0)


def test_soft_threshold_is_zero_at_and_inside_the_threshold() -> None:
    u = torch.tensor([0.5, -0.5, 0.25, 0.0, -0.0])
    assert functional.soft_threshold(u, torch.full((5,), 0.5)).tolist() == [0.0] * 5


def test_a_negative_threshold_acts_as_zero_and_can_come_back() -> None:
    u = torch.tensor([1.5, -0.25, 0.0])
    theta = torch.tensor([-0.5, -2.0, -1.0], requires_grad=True)
    v = functional.soft_threshold(u, theta)
    assert v.tolist() == [1.5, -0.25, 0.0]
    v.abs().sum().backward()
    # That of |u| - theta where u is not zero, as at a threshold of zero: a descent raises it.
    assert theta.grad.tolist() == [-1.0, -1.0, 0.0]


def test_soft_threshold_gradients_by_hand() -> None:
    u = random(4, 6).requires_grad_()
    theta = random(6, scale=0.5).abs().requires_grad_()
    g = random(4, 6)
    functional.soft_threshold(u, theta).backward(g)
    outside = (u.abs() > theta).to(g)
    assert 0 < outside.mean() < 1
    torch.testing.assert_close(u.grad, outside * g, rtol=1e-12, atol=0)
    by_hand = -(outside * u.sign() * g).sum(dim=0)
    torch.testing.assert_close(theta.grad, by_hand, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bandwidth", [0.05, 0.8])
def test_jumprelu_by_loops(bandwidth: float) -> None:
    u = random(2, 7, 5, scale=0.5).requires_grad_()
    log_theta = (random(5, scale=0.5) - 1).requires_grad_()
    g, g_gate = random(2, 7, 5), random(2, 7, 5)
    value, gate = functional.jumprelu(u, log_theta, bandwidth)
    torch.autograd.backward([value, gate], [g, g_gate])
    d_log_theta, d_u = [0.0] * 5, torch.zeros_like(u)
    inside = 0
    for b in range(2):
        for t in range(7):
            for i in range(5):
                theta, positive = math.exp(log_theta[i].item()), max(u[b, t, i].item(), 0.0)
                is_open = positive > theta
                assert value[b, t, i].item() == (positive if is_open else 0.0)
                assert gate[b, t, i].item() == float(is_open)
                if is_open:
                    d_u[b, t, i] = g[b, t, i]
                if abs((positive - theta) / bandwidth) < 0.5:
                    inside += 1
                    d_theta = -(theta / bandwidth) * g[b, t, i] - (1 / bandwidth) * g_gate[b, t, i]
                    d_log_theta[i] += (d_theta * theta).item()
    assert inside > 0
    torch.testing.assert_close(u.grad, d_u, rtol=1e-12, atol=0)
    expected = torch.tensor(d_log_theta, dtype=torch.float64)
    torch.testing.assert_close(log_theta.grad, expected, rtol=1e-10, atol=1e-12)


def test_jumprelu_ties_do_not_pass() -> None:
    value, gate = functional.jumprelu(torch.ones(3), torch.zeros(3), 0.1)
    assert value.tolist() == [0.0] * 3
    assert gate.tolist() == [0.0] * 3


def test_jumprelu_kernel_is_open_at_its_ends() -> None:
    log_theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.75, 1.25], dtype=torch.float64)
    functional.jumprelu(u, log_theta, 0.5)[0].sum().backward()
    assert log_theta.grad is not None
    assert log_theta.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_jumprelu_is_wide(dtype: torch.dtype) -> None:
    value, gate = functional.jumprelu(torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype), 0.1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == gate.dtype == wide


def test_jumprelu_passes_gradcheck_where_it_is_smooth() -> None:
    log_theta = torch.zeros(5, dtype=torch.float64)
    u = torch.tensor([-2.0, -0.5, 0.5, 1.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: functional.jumprelu(u, log_theta, 0.1)[0], u)


def test_gain_by_loops() -> None:
    u, g = random(2, 7, 5).requires_grad_(), random(2, 7, 5)
    gain = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    v, gate = functional.steering_vector(u, gain, activation="gain", bandwidth=1.0)
    assert gate is None
    v.backward(g)
    d_gain, d_u = torch.zeros(5, dtype=torch.float64), torch.zeros_like(u)
    for b in range(2):
        for t in range(7):
            for i in range(5):
                value = u[b, t, i].item()
                assert v[b, t, i].item() == (gain[i].item() * value if value > 0 else 0)
                if value > 0:
                    d_u[b, t, i] = g[b, t, i] * gain[i].item()
                    d_gain[i] += g[b, t, i] * value
    assert (v > 0).any()
    assert (v < 0).any()
    torch.testing.assert_close(u.grad, d_u, rtol=1e-12, atol=0)
    torch.testing.assert_close(gain.grad, d_gain, rtol=1e-12, atol=1e-14)


def test_a_gain_of_zero_steers_nothing_and_has_a_slope() -> None:
    u, gain = torch.tensor([[2.0, -1.0]]), torch.zeros(2, requires_grad=True)
    v, _ = functional.steering_vector(u, gain, activation="gain", bandwidth=1.0)
    assert not v.any()
    v.sum().backward()
    assert gain.grad.tolist() == [2.0, 0.0]


def test_a_feature_is_scaled_by_one_plus_its_gain_and_not_below_zero() -> None:
    # On the encoder itself u is f where the feature is active: f' = max(0, (1 + gain) f).
    sae, x = LinearSAE(4, 6), random(20, 4)
    gain = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64)
    output = steer(x, sae.W_enc.T, torch.zeros(6, dtype=torch.float64), gain, activation="gain")
    f = sae.encode(x)
    factor = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.5, 4.0], dtype=torch.float64)
    torch.testing.assert_close(output, x + (f * factor - f) @ sae.W_dec, rtol=1e-10, atol=1e-12)
    unclamped = steer(x, sae.W_enc.T, 0 * gain, gain, activation="gain", clamps=False)
    expected = x + (f * gain) @ sae.W_dec
    torch.testing.assert_close(unclamped, expected, rtol=1e-10, atol=1e-12)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'gelu'"):
        functional.steering_vector(torch.ones(2), None, activation="gelu", bandwidth=1.0)


def test_clamped_update_equals_the_difference_of_feature_activations() -> None:
    v, f = random(50, 8), torch.relu(random(50, 8))
    expected = torch.relu(f + v) - f
    torch.testing.assert_close(functional.clamped_update(v, f), expected, rtol=1e-12, atol=1e-14)


def test_clamped_update_gradients_at_ties() -> None:
    # v > -f, v < -f, a tie below zero, a tie at zero.
    v = torch.tensor([0.5, -2.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    f = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    functional.clamped_update(v, f).sum().backward()
    assert v.grad is not None
    assert f.grad is not None
    assert v.grad.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert f.grad.tolist() == [0.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_normalization_scale(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    for token, std, scale in zip(
        x.reshape(-1, 4),
        functional.normalization_scale(x, "layer_norm").reshape(-1),
        functional.normalization_scale(x, "constant_norm_rescale").reshape(-1),
        strict=True,
    ):
        mean = sum(token.tolist()) / 4
        assert std.item() == pytest.approx(
            math.sqrt(sum((t - mean) ** 2 for t in token.tolist()) / 3)
        )
        assert scale.item() == pytest.approx(math.sqrt(sum(t * t for t in token.tolist())) / 2)


@pytest.mark.parametrize("name", ["none", "expected_average_only_in", "covariance_whitening"])
def test_folded_normalizations_have_no_scale(name: str) -> None:
    assert functional.normalization_scale(random(3, 4), name) is None


def test_decode_update_by_loops() -> None:
    update, W_dec, per_feature, per_token = random(3, 5), random(5, 4), random(5), random(3, 1)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for t in range(3):
        for i in range(5):
            for d in range(4):
                expected[t, d] += update[t, i] * per_feature[i] * W_dec[i, d] * per_token[t, 0]
    actual = functional.decode_update(update, W_dec, per_feature, per_token)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


class LinearSAE:
    """A linear-ReLU dictionary of fixed matrices."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.W_enc = torch.randn(d_in, d_sae, generator=generator, dtype=torch.float64)
        self.W_dec = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64)

    def process_in(self, x: Tensor) -> Tensor:
        return x

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc)

    def decode_update(self, update: Tensor, x: Tensor) -> Tensor:
        return update @ self.W_dec


def steer(x: Tensor, weight: Tensor, bias: Tensor, theta: Tensor, **changes: Any) -> Tensor:
    settings = {"activation": "soft_threshold", "bandwidth": 0.1, "sae": LinearSAE(4, 6), **changes}
    return functional.steer(x, weight, bias, None, theta, **settings).output


@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "gain"])
def test_steer_passes_gradcheck(activation: str) -> None:
    # Random points in float64: the chance that a kink lies within 1e-6 of one is nil.
    x, weight, bias = random(5, 4), random(6, 4, scale=2.0), random(6, scale=0.1)
    inputs = [x, weight, bias, random(6, scale=0.3).abs()]
    if activation == "gain":
        inputs[-1] = torch.tensor([-3.0, -1.0, -0.2, 0.3, -2.0, 0.1], dtype=torch.float64)
    v, _ = functional.steering_vector(
        x @ weight.T + bias, inputs[-1], activation=activation, bandwidth=0.1
    )
    f = LinearSAE(4, 6).encode(x)
    # Where a feature is suppressed below zero, the output depends on x through f.
    assert activation == "relu" or ((v < -f) & (f > 0)).sum() >= 3
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *tensors: steer(*tensors, activation=activation), inputs, atol=1e-8
    )


def test_steer_clamps_what_an_edit_makes_negative() -> None:
    x, weight, bias, theta = random(3, 4), random(6, 4), random(6), torch.zeros(6)
    edited = steer(x, weight, bias, theta, activation="relu", edit=lambda v: -10 * v)
    negative = -10 * torch.relu(x @ weight.T + bias)
    sae = LinearSAE(4, 6)
    f = sae.encode(x)
    expected = x + torch.relu(f + negative) @ sae.W_dec - f @ sae.W_dec
    torch.testing.assert_close(edited, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_promotion_needs_no_encoder(activation: str) -> None:
    class Blind(LinearSAE):
        def encode(self, x: Tensor) -> Tensor:
            raise AssertionError("the encoder was called")

    x, weight, bias, theta = random(3, 4), random(6, 4), random(6), random(6)
    steer(x, weight, bias, theta, activation=activation, sae=Blind(4, 6))
    with pytest.raises(AssertionError, match="was called"):
        steer(x, weight, bias, theta, sae=Blind(4, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_norms_by_loops(dtype: torch.dtype) -> None:
    v = random(2, 3, 5).to(dtype)
    v[random(2, 3, 5) < 0] = 0
    gate = (v > 0).to(dtype).requires_grad_()
    v.requires_grad_()
    norms = functional.compute_norms(v, gate)
    for token in range(6):
        row, column = divmod(token, 3)
        values = v[row, column].tolist()
        assert norms.l0[row, column].item() == sum(value != 0 for value in values)
        assert norms.l1[row, column].item() == pytest.approx(sum(map(abs, values)), rel=1e-6)
        norm = math.sqrt(sum(value * value for value in values))
        assert norms.l2[row, column].item() == pytest.approx(norm, rel=1e-6)
        assert norms.open_gates[row, column].item() == sum(value > 0 for value in values)
    assert norms.l1.dtype == torch.promote_types(dtype, torch.float32)
    (norms.l1.sum() + 2 * norms.open_gates.sum()).backward(retain_graph=True)
    assert torch.equal(v.grad, v.sign())
    assert torch.equal(gate.grad, torch.full_like(gate, 2))
    assert not norms.l0.requires_grad
    [slope] = torch.autograd.grad(norms.l2.square().sum(), v)
    assert torch.allclose(slope, 2 * v, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    silent = torch.zeros(2, 5, dtype=dtype, requires_grad=True)
    functional.compute_norms(silent, None).l2.square().sum().backward()
    assert torch.equal(silent.grad, torch.zeros_like(silent))


def naive_masked_mean(values: list[list[float]], mask: list[list[int]], reduction: str) -> float:
    sequences = [
        [v for v, m in zip(row, marks, strict=True) if m]
        for row, marks in zip(values, mask, strict=True)
    ]
    if reduction == "token":
        tokens = [value for sequence in sequences for value in sequence]
        return sum(tokens) / len(tokens) if tokens else 0.0
    means = [sum(sequence) / len(sequence) if sequence else 0.0 for sequence in sequences]
    return sum(means) / len(means)


MASKS = {
    "right": [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    "left": [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]],
    "gap": [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]],
    "empty": [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "all-empty": [[0, 0, 0, 0]] * 3,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_masked_mean_by_loops(mask: list[list[int]], reduction: str, dtype: torch.dtype) -> None:
    values = random(3, 4).abs()
    actual = functional.masked_mean(values, torch.tensor(mask).to(dtype), reduction)
    assert actual.item() == pytest.approx(naive_masked_mean(values.tolist(), mask, reduction))


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("junk", [math.inf, -math.inf, math.nan])
def test_padding_may_hold_anything(junk: float, reduction: str) -> None:
    mask = torch.tensor(MASKS["left"])
    clean = random(3, 4)
    dirty = torch.where(mask > 0, clean, junk).requires_grad_()
    mean = functional.masked_mean(dirty, mask, reduction)
    mean.backward()
    assert mean.item() == functional.masked_mean(clean * mask, mask, reduction).item()
    assert dirty.grad is not None
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[mask == 0] == 0).all()


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_no_mask_counts_every_token(reduction: str) -> None:
    values = random(3, 4)
    assert functional.masked_mean(values, None, reduction).item() == pytest.approx(
        values.mean().item()
    )


def test_sequence_mean_does_not_depend_on_batching() -> None:
    values, mask = random(4, 6), torch.tensor([[1] * n + [0] * (6 - n) for n in (1, 3, 6, 2)])
    whole = functional.masked_mean(values, mask)
    ones = [functional.masked_mean(values[i : i + 1], mask[i : i + 1]) for i in range(4)]
    wider = functional.masked_mean(F.pad(values, (0, 3), value=9.0), F.pad(mask, (0, 3)))
    assert whole.item() == pytest.approx(torch.stack(ones).mean().item(), rel=1e-12)
    assert whole.item() == pytest.approx(wider.item(), rel=1e-12)


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="'sequence' or 'token', got 'batch'"):
        functional.masked_mean(torch.ones(1, 1), None, "batch")
