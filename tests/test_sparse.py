"""Reading only the weights that are needed: the same numbers as the formula, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from helpers import (
    ARCHITECTURES,
    D_IN,
    NORMALISATIONS,
    VARIANTS,
    accepts,
    bare_layer,
    fsrl_model,
    naive_steer,
    randomise_adapter,
    tiny_model,
    tiny_sae,
    token_ids,
)
from peft_fsrl import FSRLConfig, FSRLLayer, _sparse, freeze_sae, sae
from peft_fsrl.functional import ACTIVATIONS
from peft_fsrl.steering import only_features

WIDTH = 37
# Its attention heads divide the width.
WIDTHS = {"temporal": 40}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Select whatever it costs: at the sizes of a test the plain product would always win."""
    monkeypatch.setattr(_sparse, "_SMALLEST", 0)
    monkeypatch.setattr(_sparse, "_TOKENS_PER_ROW", 1e-9)
    monkeypatch.setattr(_sparse, "_PASSES", 0)
    # Two columns at a time.
    monkeypatch.setattr(_sparse, "_PIECE", 2 * 8 * D_IN)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def steered_layer(
    autoencoder: SAE[Any], x: Tensor, density: float, activation: str = "soft_threshold"
) -> FSRLLayer:
    """A frozen layer whose thresholds let a share of the features through at these tokens."""
    layer = bare_layer(autoencoder, activation=activation, jumprelu_bandwidth=0.4)
    adapter = layer.fsrl_adapter["default"].requires_grad_(False)
    u = F.linear(autoencoder.process_sae_in(x.double()), adapter.weight, adapter.bias).detach()
    size = u.abs() if activation == "soft_threshold" else u.relu()
    level = 1.0 if size.numel() == 0 else float(size.quantile(1 - density))
    level = {0.0: level + 1.0, 1.0: 0.0}.get(density, level)
    if activation == "soft_threshold":
        adapter.threshold.fill_(level)
    elif activation == "jumprelu":
        adapter.log_threshold.fill_(max(level, 1e-6)).log_()
    return layer


def check(autoencoder: SAE[Any], x: Tensor, density: float, activation: str) -> None:
    """Output and ``v`` are the formula's; tokens without steering pass bit for bit."""
    layer = steered_layer(autoencoder, x, density, activation)
    events: list[Any] = []
    layer.observers.append(events.append)
    with torch.no_grad():
        output = layer(x)
        adapter = layer.fsrl_adapter["default"]
        expected, v, _ = naive_steer(
            autoencoder,
            x,
            adapter.weight,
            adapter.bias,
            adapter.threshold_parameter,
            activation,
            0.4,
        )
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(events[0].steering_vector, v, rtol=1e-10, atol=1e-11)
    still = (v == 0).all(dim=-1)
    assert torch.equal(output[still], x[still])
    if activation == "soft_threshold":
        assert bool(still.all()) == (density == 0.0)
        assert bool((v != 0).all()) == (density == 1.0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_and_density(architecture: str, density: float, tokens: int) -> None:
    autoencoder = tiny_sae(architecture, dtype="float64", d_sae=WIDTHS.get(architecture, WIDTH))
    check(autoencoder, draw(1, tokens, D_IN), density, "soft_threshold")


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_every_normalisation(architecture: str, normalisation: str) -> None:
    if accepts(architecture, normalisation):
        autoencoder = tiny_sae(architecture, normalisation, dtype="float64", d_sae=WIDTH)
        check(autoencoder, draw(2, 3, D_IN), 0.2, "soft_threshold")


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_and_activation(variant: str, activation: str) -> None:
    architecture, settings = VARIANTS[variant]
    autoencoder = tiny_sae(
        architecture, dtype="float64", d_sae=WIDTHS.get(architecture, WIDTH), **settings
    )
    check(autoencoder, draw(1, 3, D_IN), 0.2, activation)


@pytest.mark.usefixtures("always")
def test_input_that_is_not_contiguous() -> None:
    autoencoder = tiny_sae("jumprelu", dtype="float64", d_sae=WIDTH)
    x = draw(D_IN, 3, 2).transpose(0, 2)
    assert not x.is_contiguous()
    check(autoencoder, x, 0.2, "soft_threshold")


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_token_at_all(architecture: str) -> None:
    x = draw(1, 0, D_IN)
    width = WIDTHS.get(architecture, WIDTH)
    layer = steered_layer(tiny_sae(architecture, dtype="float64", d_sae=width), x, 1.0)
    with torch.no_grad():
        assert torch.equal(layer(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.usefixtures("always")
def test_no_less_precise_than_the_plain_product(dtype: torch.dtype) -> None:
    exact = tiny_sae("jumprelu", dtype="float64", d_sae=WIDTH)
    layer = steered_layer(exact, draw(1, 3, D_IN), 0.3).to(dtype)
    sparse, v = layer.fsrl_sae["default"], draw(1, 3, WIDTH).to(dtype)
    v = torch.where(v.abs() > 1, v, 0.0)
    x = draw(1, 3, D_IN).to(dtype)
    expected = v.double() @ sparse.W_dec.double()
    plain, selected = sparse.decode_update(v, x), sparse.decode_update(v, x, selects=True)
    assert selected.dtype == plain.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps * (v.double().abs() @ sparse.W_dec.double().abs())
    assert ((selected - expected).abs() <= bound).all()
    f = sparse.encode(x)
    some = sparse.encode(x, v < 0)
    torch.testing.assert_close(some[v < 0], f[v < 0])
    assert (some >= 0).all()


def poison(autoencoder: SAE[Any], keep_rows: Tensor, keep_columns: Tensor) -> None:
    """Whoever reads what is not kept gets nan."""
    rows, columns = torch.ones(2, autoencoder.cfg.d_sae, dtype=torch.bool)
    rows[keep_rows], columns[keep_columns] = False, False
    with torch.no_grad():
        autoencoder.W_dec[rows] = float("nan")
        autoencoder.W_enc[:, columns] = float("nan")


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_reads_only_what_is_needed(
    architecture: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sparse, "_SMALLEST", 0)
    autoencoder = tiny_sae(architecture, dtype="float64", d_sae=2048)
    x = draw(1, tokens, D_IN)
    adapter = steered_layer(autoencoder, x, 0.002).fsrl_adapter["default"]
    expected, v, _ = naive_steer(autoencoder, x, adapter.weight, adapter.bias, adapter.threshold)
    active, negative = (v != 0).flatten(0, 1).any(0), (v < 0).flatten(0, 1).any(0)
    assert 0 < negative.sum() < active.sum()
    poison(autoencoder, active, negative)
    layer = steered_layer(autoencoder, x, 0.002)
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("always")
def test_promotions_alone_need_no_encoder() -> None:
    autoencoder = tiny_sae("topk", dtype="float64", d_sae=WIDTH)
    x = draw(1, 1, D_IN)
    layer = steered_layer(autoencoder, x, 1.0)
    layer.edits.append(lambda v, _: v.relu())
    expected = layer(x)
    poison(autoencoder, torch.arange(WIDTH), torch.tensor([], dtype=torch.long))
    blind = steered_layer(autoencoder, x, 1.0)
    blind.edits.append(lambda v, _: v.relu())
    with torch.no_grad():
        found = blind(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_many_features_take_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    bag = F.embedding_bag
    monkeypatch.setattr(F, "embedding_bag", lambda *a, **k: calls.append(len(a[0])) or bag(*a, **k))
    W_dec, W_enc = draw(WIDTH, D_IN), torch.empty(1024, D_IN).T
    assert _sparse.columns_to_read(torch.zeros(1, 1024, dtype=torch.bool), W_enc) is None
    _sparse.sparse_product(torch.zeros(1, WIDTH, dtype=torch.float64), W_dec)
    assert not calls
    monkeypatch.setattr(_sparse, "_SMALLEST", 0)
    for tokens, density, selects in ((1, 1.0, True), (64, 1.0, False), (64, 0.02, True)):
        update = draw(tokens, WIDTH)
        update = torch.where(torch.rand_like(update) < density, update, 0.0)
        calls.clear()
        found = _sparse.sparse_product(update, W_dec)
        torch.testing.assert_close(found, update @ W_dec, rtol=1e-10, atol=1e-12)
        assert bool(calls) == selects
    few, all_of_them = torch.zeros(2, 1024, dtype=torch.bool)
    few[5], all_of_them[:] = True, True
    assert _sparse.columns_to_read(all_of_them, W_enc) is None
    [columns] = _sparse.columns_to_read(few, W_enc) or ()
    assert columns.tolist() == [5]


@pytest.mark.usefixtures("always")
def test_only_eagerly_and_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(1, 3, D_IN)
    layer = steered_layer(tiny_sae(dtype="float64", d_sae=WIDTH), x, 0.3)
    expected = layer(x)
    seen: list[Tensor] = []
    product = _sparse.sparse_product
    monkeypatch.setattr(sae, "sparse_product", lambda *a: seen.append(a[0]) or product(*a))

    def selects(run: Any) -> bool:
        seen.clear()
        torch.testing.assert_close(run(), expected, rtol=1e-10, atol=1e-11)
        return bool(seen)

    assert not selects(lambda: layer(x))
    with torch.no_grad():
        assert selects(lambda: layer(x))
        assert not selects(lambda: torch.func.vmap(layer)(x))
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert not selects(lambda: compiled(x))
    with torch.inference_mode():
        assert selects(lambda: layer(x))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == x.shape


@pytest.mark.usefixtures("always")
def test_generation_is_what_the_plain_product_gives() -> None:
    autoencoder = tiny_sae("jumprelu", d_sae=WIDTH)
    model = fsrl_model(sae=autoencoder)
    model.add_adapter("other", FSRLConfig(sae=autoencoder, layer=1, activation="relu"))
    [layer] = [module for module in model.modules() if isinstance(module, FSRLLayer)]
    randomise_adapter(layer, "other", seed=7)
    ids = token_ids(batch=3)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def logits(**kwargs: Any) -> Tensor:
        return model(input_ids=ids, **kwargs).logits.detach()

    names = ["other", "__base__", "default"]
    cases: list[dict[str, Any]] = [{}, {"adapter_names": names}]
    plain = [logits(**case) for case in cases]
    with only_features(model, [3, 5, 8]):
        plain.append(logits())
    with torch.no_grad():
        selected = [logits(**case) for case in cases]
        with only_features(model, [3, 5, 8]):
            selected.append(logits())
        tokens = model.generate(input_ids=ids, **settings)
    assert not torch.allclose(plain[0], plain[1], atol=1e-3)
    for one, other in zip(selected, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(logits(), tiny_model()(input_ids=ids).logits)
    # Greedy decoding token by token is the argmax of one pass over what it wrote.
    whole = model(input_ids=tokens[:, :-1]).logits.argmax(-1)
    assert torch.equal(whole[:, ids.shape[1] - 1 :], tokens[:, ids.shape[1] :])


def flops(layer: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops()


def test_cost_is_in_proportion_to_the_features() -> None:
    autoencoder = tiny_sae("jumprelu", d_sae=WIDTH)
    x = draw(2, 3, D_IN).float()

    def cost(features: list[int] | None) -> int:
        layer = FSRLLayer(nn.Identity(), "identity")
        frozen = freeze_sae(autoencoder)
        frozen = frozen if features is None else frozen.restrict(features)
        layer.update_layer("default", FSRLConfig(layer=0, sae=autoencoder), frozen)
        return flops(layer, x)

    per_feature = 3 * 2 * x.shape[0] * x.shape[1] * D_IN
    assert cost(None) == per_feature * WIDTH
    assert cost([3, 5, 8, 13]) == per_feature * 4


def test_adapters_of_a_mixed_batch_share_the_work() -> None:
    autoencoder = tiny_sae("jumprelu", d_sae=WIDTH)
    layer = bare_layer(autoencoder, torch.float32)
    layer.update_layer("other", FSRLConfig(layer=0, sae=autoencoder), layer.fsrl_sae["default"])
    x = draw(4, 3, D_IN).float()
    alone = flops(layer, x)
    layer.batch_adapter_names = ["default", "other", "default", "other"]
    assert flops(layer, x) == alone
    layer.batch_adapter_names = ["default", "__base__", "default", "__base__"]
    assert flops(layer, x) == alone / 2
