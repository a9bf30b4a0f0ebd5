"""What holds for every shape, dtype, activation, mask and SAE: drawn by hypothesis."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import (
    ARCHITECTURES,
    SAE_CASES,
    bare_layer,
    fits,
    randomize_adapter,
    tiny_sae,
)
from peft_fsrl import FSRLConfig, FSRLLayer, freeze_sae
from peft_fsrl.functional import ACTIVATIONS, masked_mean
from peft_fsrl.steering import token_statistics
from peft_fsrl.tuner.layer import SteeringEvent

# The same examples in every run: a failure is one of this code, not of the day.
several = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

# torch, in SAELens's layer norm as in ours, where there is no token at all.
pytestmark = pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom is <= 0:UserWarning")

BANDWIDTH = 0.4
# Machine epsilons, and what a matrix product over a few dozen terms loses beyond them.
EPSILON = {t: torch.finfo(t).eps for t in (torch.float64, torch.float32)}
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
CASES = st.sampled_from(SAE_CASES)
SHAPES = st.one_of(
    st.tuples(st.integers(0, 5)),
    st.tuples(st.integers(0, 3), st.integers(0, 4)),
    st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 3)),
)
SEQUENCES = st.tuples(st.integers(0, 3), st.integers(1, 5))


def reference(layer: FSRLLayer, sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Steered output and ``v`` for each token by itself, in float64, by SAELens alone.

    Args:
        layer: gives parameters and activation.
        sae: the SAE as SAELens made it, in float64.
        x: activations, shape ``(..., d_in)``, float64.
    """
    adapter = layer.fsrl_adapter["default"]
    weight, bias = adapter.weight.detach().double(), adapter.bias.detach().double()
    if adapter.down is not None:
        weight = weight @ adapter.down.detach().double()
    theta = adapter.threshold_parameter
    theta = None if theta is None else theta.detach().double()
    signed = sae.cfg.architecture() == "abstopk"
    with torch.no_grad():
        u = sae.process_sae_in(x) @ weight.T + bias
        v = torch.zeros_like(u)
        for index in range(bias.numel()):
            column = u[..., index]
            if adapter.activation == "relu":
                chosen = torch.where(column > 0, column, 0.0)
            elif adapter.activation == "jumprelu":
                assert theta is not None
                chosen = torch.where(column > math.exp(theta[index]), column, 0.0)
            elif adapter.activation == "gain":
                assert theta is not None
                chosen = torch.where(column > 0, theta[index] * column, 0.0)
            else:
                assert theta is not None
                size = column.abs() - theta[index]
                chosen = torch.where(size > 0, size * column.sign(), 0.0)
            v[..., index] = chosen
        f = sae.encode(x)
        before = sae.decode(f)
        sae.encode(x)
        after = sae.decode(f + v if signed else torch.clamp(f + v, min=0))
    return x + after - before, v


def odd_sae(architecture: str, normalization: str, seed: int, d_sae: int = 13) -> Any:
    """A float64 SAE of an odd width, where the architecture lets it have one."""
    if architecture == "temporal":
        d_sae = 16
    return tiny_sae(architecture, normalization, dtype="float64", d_sae=d_sae, seed=seed)


def make_layer(sae: Any, dtype: torch.dtype, seed: int, **options: Any) -> FSRLLayer:
    layer = bare_layer(sae, dtype, seed=seed, jumprelu_bandwidth=BANDWIDTH, **options)
    return layer.requires_grad_(False)


def draw_tokens(shape: tuple[int, ...], d_in: int, seed: int, layout: str) -> Tensor:
    """Activations in float64; not contiguous unless the layout says so."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed":
        full = torch.randn((d_in, *shape), generator=generator, dtype=torch.float64)
        return full.movedim(0, -1)
    if layout == "strided":
        full = torch.randn((*shape, 2 * d_in), generator=generator, dtype=torch.float64)
        return full[..., ::2]
    return torch.randn((*shape, d_in), generator=generator, dtype=torch.float64)


LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided"])


@several
@given(
    case=CASES,
    activation=st.sampled_from(ACTIVATIONS),
    shape=SHAPES,
    layout=LAYOUTS,
    d_sae=st.sampled_from([7, 13, 25]),
    rank=st.sampled_from([None, None, 3]),
    seed=st.integers(0, 2**16),
)
def test_steered_output_is_the_formula(
    case: tuple[str, str],
    activation: str,
    shape: tuple[int, ...],
    layout: str,
    d_sae: int,
    rank: int | None,
    seed: int,
) -> None:
    architecture, normalization = case
    # It reads whole sequences.
    assume(architecture != "temporal" or (len(shape) == 2 and shape[1] > 0))
    assume(fits(architecture, activation, rank))
    sae = odd_sae(architecture, normalization, seed, d_sae)
    layer = make_layer(sae, torch.float64, seed, activation=activation, rank=rank)
    events: list[SteeringEvent] = []
    layer.observers.append(events.append)
    x = draw_tokens(shape, 16, seed, layout)
    untouched = x.clone()
    output = layer(x)
    expected, v = reference(layer, sae, x)
    assert output.shape == x.shape == (*shape, 16)
    assert torch.equal(x, untouched)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    [event] = events
    assert event.steering_vector.shape == v.shape
    torch.testing.assert_close(event.steering_vector, v, rtol=1e-9, atol=1e-10)
    statistics = token_statistics(event)
    assert torch.equal(statistics.l0, (event.steering_vector != 0).sum(-1).double())
    torch.testing.assert_close(statistics.l1, v.abs().sum(-1), rtol=1e-9, atol=1e-9)
    assert statistics.nonfinite.sum() == 0


@several
@given(
    architecture=st.sampled_from([a for a in ARCHITECTURES if a not in ("topk", "abstopk")]),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=DTYPES,
    adapter_dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=SEQUENCES,
    seed=st.integers(0, 2**16),
)
def test_output_keeps_its_dtype_and_is_rounded_once(
    architecture: str,
    activation: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    shape: tuple[int, ...],
    seed: int,
) -> None:
    assume(fits(architecture, activation))
    # Narrow activations, wide adapter and SAE: all that is lost is the rounding of the result.
    sae = odd_sae(architecture, "none", seed)
    layer = make_layer(sae, torch.float64, seed, activation=activation)
    layer.fsrl_adapter.to(adapter_dtype)
    x = draw_tokens(shape, 16, seed, "contiguous").to(dtype)
    exact, v = reference(layer, sae, x.double())
    # A pre-activation within rounding of its threshold may fall on either side of it.
    theta = layer.fsrl_adapter["default"].threshold_parameter
    if adapter_dtype == torch.float32:
        edge = torch.zeros(()) if theta is None or activation == "gain" else theta
        edge = edge.exp() if activation == "jumprelu" else edge
        weight, bias = (getattr(layer.fsrl_adapter["default"], n) for n in ("weight", "bias"))
        u = sae.process_sae_in(x.double()) @ weight.double().T + bias.double()
        assume(((u.abs() - edge.double()).abs() > 1e-4).all())
    output = layer(x)
    assert output.dtype == dtype
    delta = exact - x.double()
    lost = torch.finfo(dtype).eps * (delta.abs() + exact.abs() + x.double().abs())
    computed = 64 * EPSILON[adapter_dtype] * (1 + v.abs().sum(-1, keepdim=True))
    error = (output.double() - exact).abs()
    assert (error <= lost + computed).all(), (error - lost - computed).max()


@several
@given(
    case=CASES,
    activation=st.sampled_from(ACTIVATIONS),
    dtype=DTYPES,
    shape=SEQUENCES,
    layout=LAYOUTS,
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_no_steering_is_the_same_bits(
    case: tuple[str, str],
    activation: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    scale: float,
    seed: int,
) -> None:
    assume(fits(case[0], activation))
    layer = make_layer(tiny_sae(*case, seed=seed % 7), torch.float32, seed, activation=activation)
    adapter = layer.fsrl_adapter["default"]
    adapter.weight.zero_()
    adapter.bias.fill_(-0.25)
    if activation == "soft_threshold":
        adapter.threshold.fill_(0.25)
    x = (draw_tokens(shape, 16, seed, layout) * scale).to(dtype)
    output = layer(x)
    assert output.dtype == dtype
    assert torch.equal(output, x)


@several
@given(
    case=CASES,
    activation=st.sampled_from(ACTIVATIONS),
    chosen=st.sets(st.integers(0, 12), min_size=1),
    shape=SEQUENCES,
    seed=st.integers(0, 2**16),
)
def test_some_features_are_all_features_with_the_other_rows_zero(
    case: tuple[str, str],
    activation: str,
    chosen: set[int],
    shape: tuple[int, ...],
    seed: int,
) -> None:
    assume(fits(case[0], activation))
    sae = odd_sae(*case, seed)
    rows = sorted(chosen)
    whole = make_layer(sae, torch.float64, seed, activation=activation)
    config = FSRLConfig(
        layer=0, sae=sae, features=rows, activation=activation, jumprelu_bandwidth=BANDWIDTH
    )
    some = FSRLLayer(nn.Identity(), "identity")
    some.update_layer("default", config, freeze_sae(sae).restrict(rows))
    some.to(torch.float64).requires_grad_(False)
    source, target = whole.fsrl_adapter["default"], some.fsrl_adapter["default"]
    others = [index for index in range(sae.cfg.d_sae) if index not in chosen]
    for name, tensor in target.state_dict().items():
        if name != "identity":
            tensor.copy_(source.state_dict()[name][rows])
    source.weight[others] = 0
    source.bias[others] = 0
    x = draw_tokens(shape, 16, seed, "contiguous")
    expected, _ = reference(whole, sae, x)
    torch.testing.assert_close(whole(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(some(x), expected, rtol=1e-9, atol=1e-9)


@several
@given(
    case=CASES,
    activation=st.sampled_from(ACTIVATIONS),
    rank=st.sampled_from([None, 1, 5]),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
)
def test_state_dicts_go_round(
    case: tuple[str, str], activation: str, rank: int | None, dtype: torch.dtype, seed: int
) -> None:
    assume(fits(case[0], activation, rank))
    sae = tiny_sae(*case, seed=seed % 7)
    layer = make_layer(sae, dtype, seed, activation=activation, rank=rank)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    names = {"weight", "bias", "identity"} | ({"down"} if rank else set())
    names |= {
        "soft_threshold": {"threshold"},
        "jumprelu": {"log_threshold"},
        "relu": set(),
        "gain": {"gain"},
    }[activation]
    assert set(state) == {f"fsrl_adapter.default.{name}" for name in names}
    other = copy.deepcopy(layer)
    randomize_adapter(other, seed=seed + 1)
    x = draw_tokens((2, 3), 16, seed, "contiguous").to(dtype)
    expected = layer(x)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), expected)


def masks() -> st.SearchStrategy[tuple[list[list[int]], int]]:
    """Rows of tokens and padding: to the left, to the right, with holes, or nothing but padding."""

    def row(length: int) -> st.SearchStrategy[list[int]]:
        left = st.integers(0, length).map(lambda n: [0] * n + [1] * (length - n))
        right = st.integers(0, length).map(lambda n: [1] * n + [0] * (length - n))
        holes = st.lists(st.integers(0, 1), min_size=length, max_size=length)
        return st.one_of(left, right, holes)

    return st.integers(0, 6).flatmap(
        lambda length: st.tuples(st.lists(row(length), min_size=1, max_size=4), st.just(length))
    )


@several
@given(
    mask=masks(),
    reduction=st.sampled_from(["sequence", "token"]),
    mask_dtype=st.sampled_from([torch.bool, torch.int64, torch.float32]),
    junk=st.sampled_from([0.0, 7.0, math.nan, math.inf]),
    seed=st.integers(0, 2**16),
)
def test_masked_mean_is_a_loop(
    mask: tuple[list[list[int]], int],
    reduction: str,
    mask_dtype: torch.dtype,
    junk: float,
    seed: int,
) -> None:
    rows, length = mask
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(rows), length, generator=generator, dtype=torch.float64)
    real = torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)
    values[real == 0] = junk
    means, all_values = [], []
    for row, kept in zip(values.tolist(), rows, strict=True):
        of_row = [value for value, is_real in zip(row, kept, strict=True) if is_real]
        all_values += of_row
        means.append(sum(of_row) / len(of_row) if of_row else 0.0)
    by_token = sum(all_values) / len(all_values) if all_values else 0.0
    expected = sum(means) / len(means) if reduction == "sequence" else by_token
    found = masked_mean(values, real.to(mask_dtype), reduction)
    assert found.shape == ()
    assert math.isclose(found.item(), expected, rel_tol=1e-12, abs_tol=1e-12)
