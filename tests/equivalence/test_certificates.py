"""Certificates: the LoRA that FSRL is around a token, against SAELens's own encode and decode."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from helpers import (
    D_IN,
    D_SAE,
    SAE_CASES,
    VARIANTS,
    bare_layer,
    fits,
    fsrl_model,
    naive_steer,
    naive_vector,
    only_layer,
    randomize_adapter,
    tiny_model,
    tiny_sae,
    token_ids,
)
from peft_fsrl import FSRLConfig, FSRLLayer, freeze_sae
from peft_fsrl.equivalence import NotAffineError, RestrictedLoRA, certify, restricted_lora
from peft_fsrl.equivalence.boundaries import Exit, Geometry, Half
from peft_fsrl.functional import ACTIVATIONS
from peft_fsrl.steering import ablate_features, observe

RUN_TIME = {"layer_norm", "constant_norm_rescale"}
UNKNOWN_ENCODERS = {"matching_pursuit", "temporal"}


def tokens(n: int = 6, seed: int = 0, d_in: int = D_IN) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator, dtype=torch.float64)


class Naive:
    """What a layer computes, by SAELens's encode and decode, each token a sequence of its own."""

    def __init__(self, sae: Any, layer: FSRLLayer) -> None:
        self.sae, self.adapter = sae, layer.fsrl_adapter["default"]

    def __call__(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        weight = adapter.weight if adapter.down is None else adapter.weight @ adapter.down
        output, _, _ = naive_steer(
            self.sae,
            x.reshape(-1, 1, x.shape[-1]),
            weight,
            adapter.bias,
            adapter.threshold_parameter,
            adapter.activation,
            adapter.bandwidth,
            adapter.non_negative,
        )
        return output.reshape(x.shape)

    def pattern(self, x: Tensor) -> tuple[set[int], set[int]]:
        """The features that act by ``v``, and those that act by ``-f``."""
        adapter = self.adapter
        u = self.sae.process_sae_in(x) @ adapter.weight.T + adapter.bias
        v, _ = naive_vector(u, adapter.threshold_parameter, adapter.activation, 1.0)
        f = self.sae.encode(x[None, None])[0, 0]
        clamps = adapter.non_negative and self.sae.cfg.architecture() != "abstopk"
        active, clipped = set(), set()
        for i in range(len(v)):
            if v[i] > 0 or (v[i] < 0 and (not clamps or f[i] + v[i] > 0)):
                active.add(i)
            elif v[i] < 0 and f[i] > 0:
                clipped.add(i)
        return active, clipped


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


def normals(layer: FSRLLayer, sae: Any) -> Tensor:
    """Directions in which some boundary is near: rows of adapter and encoder and their sums."""
    rows = layer.fsrl_adapter["default"].weight
    if not hasattr(sae, "W_enc"):
        return rows / rows.norm(dim=1, keepdim=True)
    parts = [rows, sae.W_enc.T, rows + sae.W_enc.T, sae.W_enc.T[:, None] - sae.W_enc.T[None]]
    stacked = torch.cat([part.reshape(-1, rows.shape[1]) for part in parts])
    stacked = stacked[stacked.norm(dim=1) > 0]
    return torch.cat([stacked, -stacked]) / stacked.norm(dim=1).repeat(2)[:, None]


def exact_everywhere_inside(certificate: RestrictedLoRA, naive: Naive, directions: Tensor) -> None:
    x = certificate.x
    assert relative(certificate.apply(x), naive(x)) < 1e-12
    change = naive(x) - x
    if change.any():
        assert relative(certificate.apply(x) - x, change) < 1e-10
    reach = min(certificate.radius, 100.0) * (1 - 1e-6)
    points = x + reach * torch.cat([certificate.direction[None], directions])
    errors = (certificate.apply(points) - naive(points)).norm(dim=1) / naive(points).norm(dim=1)
    assert float(errors.max().detach()) < 1e-10


# An SAE whose normalization is folded into its weights computes what one without does.
CASES = [
    (architecture, normalization, activation, non_negative)
    for architecture, normalization in SAE_CASES
    for activation in ACTIVATIONS
    for non_negative in (True, False)
    if fits(architecture, activation)
    if normalization == "none"
    or (activation == "soft_threshold" and non_negative)
    or (normalization in RUN_TIME and activation == "relu" and non_negative)
]


@pytest.mark.parametrize(("architecture", "normalization", "activation", "non_negative"), CASES)
def test_exact_within_the_radius_or_refused(
    architecture: str, normalization: str, activation: str, non_negative: bool
) -> None:
    sae = tiny_sae(architecture, normalization, dtype="float64")
    layer = bare_layer(sae, activation=activation, non_negative=non_negative)
    clamps = non_negative and activation in ("soft_threshold", "gain")
    if normalization in RUN_TIME or (clamps and architecture in UNKNOWN_ENCODERS):
        reason = "normalizes each token" if normalization in RUN_TIME else "not affine feature by"
        with pytest.raises(NotAffineError, match=reason) as refused:
            certify(layer, tokens(3))
        assert refused.value.tokens == ((0,), (1,), (2,))
        return
    naive = Naive(sae, layer)
    directions = normals(layer, sae)[::17]
    for certificate in certify(layer, tokens(2)):
        exact_everywhere_inside(certificate, naive, directions)
        active, clipped = naive.pattern(certificate.x)
        assert (set(certificate.active), set(certificate.clipped)) == (active, clipped)
        assert certificate.rank <= len(active) + len(clipped)
    jacobian = torch.autograd.functional.jacobian(naive, certificate.x)
    expected = torch.eye(D_IN, dtype=torch.float64) + certificate.lora_B @ certificate.lora_A
    assert relative(expected, jacobian) < 1e-10
    assert certificate.check().holds()


@pytest.mark.parametrize(
    ("variant", "activation"),
    [
        (name, each)
        for name in VARIANTS
        for each in ACTIVATIONS
        if VARIANTS[name][0] not in UNKNOWN_ENCODERS and fits(VARIANTS[name][0], each)
    ],
)
def test_exact_for_variants(variant: str, activation: str) -> None:
    architecture, settings = VARIANTS[variant]
    sae = tiny_sae(architecture, dtype="float64", **settings)
    layer = bare_layer(sae, activation=activation)
    directions = normals(layer, sae)[::17]
    for certificate in certify(layer, tokens()):
        exact_everywhere_inside(certificate, Naive(sae, layer), directions)


def test_every_branch_is_taken() -> None:
    found = set()
    for architecture in ("standard", "jumprelu", "gated", "topk"):
        layer = bare_layer(tiny_sae(architecture, dtype="float64"))
        certificates = certify(layer, tokens(60))
        assert any(c.active for c in certificates)
        assert any(c.clipped for c in certificates)
        found |= {(c.boundary, c.tight) for c in certificates}
    boundaries = {(b, True) for b in ("threshold", "clamp", "encoder", "suppression")}
    assert found == boundaries | {("encoder", False), ("suppression", False)}


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_radius_is_tight(architecture: str, activation: str) -> None:
    sae = tiny_sae(architecture, dtype="float64")
    layer = bare_layer(sae, activation=activation)
    naive = Naive(sae, layer)
    for certificate in certify(layer, tokens(16)):
        assert certificate.tight
        here = naive.pattern(certificate.x)
        step = certificate.radius * certificate.direction
        assert naive.pattern(certificate.x + (1 - 1e-9) * step) == here
        assert naive.pattern(certificate.x + (1 + 1e-9) * step) != here
        beyond = certificate.x + 1.01 * step
        assert relative(certificate.apply(beyond), naive(beyond)) > 1e-9


# Activation, clamp, and whether there is a threshold: relu has none, that of jumprelu is never 0.
WAYS = [
    ("soft_threshold", True, True),
    ("soft_threshold", True, False),
    ("soft_threshold", False, True),
    ("relu", True, True),
    ("jumprelu", True, True),
    ("gain", True, True),
    ("gain", False, True),
]


@pytest.mark.parametrize(
    ("architecture", "activation", "non_negative", "threshold"),
    [
        (name, *way)
        for name in ("standard", "jumprelu", "gated", "topk")
        for way in WAYS
        if fits(name, way[0])
    ],
)
def test_the_radius_by_brute_force_in_the_plane(
    architecture: str, activation: str, non_negative: bool, threshold: bool
) -> None:
    # In two dimensions every direction can be tried: walk each ray and see where the LoRA breaks.
    settings = {"k": 2} if architecture == "topk" else {}
    sae = tiny_sae(architecture, dtype="float64", d_in=2, d_sae=5, **settings)
    layer = bare_layer(sae, activation=activation, non_negative=non_negative)
    if not threshold:
        layer.fsrl_adapter["default"].threshold.data.zero_()
    angles = torch.linspace(0, 2 * math.pi, 241, dtype=torch.float64)[:-1]
    rays = torch.stack([angles.cos(), angles.sin()], dim=1)
    looser = 0
    for certificate in certify(layer, tokens(6, d_in=2)):
        limit = 1.3 * min(certificate.radius, 20.0)
        lengths = torch.linspace(1 / 60, 1, 60, dtype=torch.float64) * limit
        points = certificate.x + lengths[:, None, None] * rays
        with torch.no_grad():
            wrong = (layer(points) - certificate.apply(points)).norm(dim=-1) > 1e-9
        if certificate.radius > 20.0:
            assert not wrong.any()
            continue
        first = float(lengths[wrong.any(dim=1)].min()) if wrong.any() else math.inf
        # The walk goes in steps of 2.2 % of the radius, over directions 1.5 degrees apart.
        assert first > 0.999 * certificate.radius
        if certificate.tight:
            assert first < 1.04 * certificate.radius
        else:
            looser += first > 1.04 * certificate.radius
    assert looser == 0 or architecture == "topk"


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_gains_on_the_encoder_itself(architecture: str) -> None:
    # Adapter and encoder switch at one hyperplane, or at parallel ones.
    sae = tiny_sae(architecture, dtype="float64")
    layer = FSRLLayer(nn.Identity(), "identity")
    layer.update_layer("default", FSRLConfig(layer=0, sae=sae, activation="gain"), freeze_sae(sae))
    layer.double()
    adapter = layer.fsrl_adapter["default"]
    rows, offsets = layer.fsrl_sae["default"].encoder_rows()
    with torch.no_grad():
        # The layer made them in float32.
        adapter.weight.copy_(rows)
        adapter.bias.copy_(offsets)
        adapter.gain.copy_(torch.linspace(-2, 2, D_SAE))
        adapter.gain[3] = 0
    naive, clipped = Naive(sae, layer), set()
    for certificate in certify(layer, tokens(16)):
        exact_everywhere_inside(certificate, naive, normals(layer, sae)[::29])
        assert certificate.check().holds()
        clipped |= set(certificate.clipped)
        assert 3 not in certificate.active
        # Their rows come first.
        for feature, row in zip(certificate.active, certificate.lora_A, strict=False):
            torch.testing.assert_close(row, adapter.gain[feature] * rows[feature])
    assert clipped


def test_a_negative_threshold_acts_as_zero() -> None:
    sae = tiny_sae(dtype="float64")
    layer = bare_layer(sae)
    with torch.no_grad():
        layer.fsrl_adapter["default"].threshold.sub_(0.5)
    steered = Naive(sae, bare_layer(sae))
    with torch.no_grad():
        steered.adapter.threshold.sub_(0.5).clamp_(min=0)
    for certificate in certify(layer, tokens()):
        exact_everywhere_inside(certificate, steered, normals(layer, sae)[::29])
        assert certificate.check().holds()


@pytest.mark.parametrize("architecture", ["standard", "topk", "matching_pursuit", "temporal"])
def test_without_clamp_and_threshold_one_lora_is_exact_everywhere(architecture: str) -> None:
    layer = bare_layer(tiny_sae(architecture, dtype="float64"), non_negative=False)
    layer.fsrl_adapter["default"].threshold.data.zero_()
    first, second = certify(layer, tokens(2))
    assert first.radius == second.radius == math.inf
    assert first.rank == D_IN
    far = 100 * tokens(8, seed=1)[:, None]
    torch.testing.assert_close(first.apply(far), layer(far), rtol=1e-10, atol=1e-9)
    assert first.check().holds()


def test_where_nothing_is_steered_the_lora_is_empty() -> None:
    layer = bare_layer(tiny_sae(dtype="float64"), activation="relu")
    with torch.no_grad():
        layer.fsrl_adapter["default"].weight.zero_()
        layer.fsrl_adapter["default"].bias.fill_(-1.0)
    [certificate] = certify(layer, tokens(1))
    assert (certificate.rank, certificate.active, certificate.radius) == (0, (), math.inf)
    assert torch.equal(certificate.apply(certificate.x), certificate.x)
    assert certificate.check().holds()
    assert certificate.check().outside_error is None


@pytest.mark.parametrize("architecture", ["standard", "topk", "abstopk"])
def test_b_is_made_of_decoder_columns(architecture: str) -> None:
    sae = tiny_sae(architecture, dtype="float64", seed=3)
    layer = bare_layer(sae)
    certificate = max(certify(layer, tokens()), key=lambda c: len(c.clipped))
    columns = [sae.W_dec[i] for i in certificate.active] + [
        -sae.W_dec[i] for i in certificate.clipped
    ]
    torch.testing.assert_close(certificate.lora_B, torch.stack(columns, dim=1).detach())
    weight = layer.fsrl_adapter["default"].weight
    rows = [weight[i] for i in certificate.active] + [sae.W_enc[:, i] for i in certificate.clipped]
    torch.testing.assert_close(certificate.lora_A, torch.stack(rows).detach())


@pytest.mark.parametrize(
    ("architecture", "normalization"), [case for case in SAE_CASES if case[1] not in RUN_TIME]
)
def test_directions_are_what_the_decoder_adds(architecture: str, normalization: str) -> None:
    sae = tiny_sae(architecture, normalization, dtype="float64")
    frozen = freeze_sae(sae).restrict([1, 5, 7])
    one_hot = torch.eye(D_SAE, dtype=torch.float64)[[1, 5, 7]]
    zero = torch.zeros(D_SAE, dtype=torch.float64)
    expected = torch.stack([sae.decode(zero + each) - sae.decode(zero) for each in one_hot])
    torch.testing.assert_close(frozen.directions, expected.detach())


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
@pytest.mark.parametrize("rank", [None, 3])
def test_restricted_features_and_low_rank(architecture: str, rank: int | None) -> None:
    sae = tiny_sae(architecture, "none", seed=1)
    features = [2, 3, 5, 11, 17, 20]
    model = fsrl_model(sae=sae, features=features, rank=rank)
    certificates = restricted_lora(model, token_ids(1, 5))
    used = {f for c in certificates for f in (*c.active, *c.clipped)}
    assert used <= set(features)
    assert used
    assert {c.boundary_feature for c in certificates} <= set(features)
    for certificate in certificates:
        check = certificate.check()
        assert check.holds()
        assert check.own_error < 1e-5


class Broken:
    """A layer's map whose factors are a little off."""

    def __init__(self, right: Any, **changes: Any) -> None:
        self.right, self.changes = right, changes

    def factors(self, state: Tensor) -> Any:
        factors = self.right.factors(state)
        changed = {name: change(getattr(factors, name)) for name, change in self.changes.items()}
        return factors._replace(**changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_a_broken_certificate_does_not_hold(scale: float) -> None:
    layer = bare_layer(tiny_sae("jumprelu", dtype="float64"))
    adapter = layer.fsrl_adapter["default"]
    for parameter in (adapter.weight, adapter.bias, adapter.threshold):
        parameter.data.mul_(scale)
    good = certify(layer, tokens())[0]
    assert good.check().holds()
    for change in (
        {"radius": good.radius * 1.05},
        {"radius": good.radius * 0.9},
        {"x": good.x + 2 * good.radius * good.direction},
        {"state": good.state.roll(1)},
        {"_map": Broken(good._map, lora_A=lambda a: a * (1 + 1e-6))},
        {"_map": Broken(good._map, lora_B=lambda b: b * (1 + 1e-6))},
        {"_map": Broken(good._map, offset=lambda o: o + 1e-6 * scale)},
    ):
        assert not dataclasses.replace(good, **change).check().holds(), change


def test_a_model_and_its_padding() -> None:
    model = fsrl_model()
    ids, mask = token_ids(), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    certificates = restricted_lora(model, {"input_ids": ids, "attention_mask": mask})
    assert [c.token for c in certificates] == [tuple(p) for p in mask.nonzero().tolist()]
    seen, hidden = [], []
    hook = model.get_submodule("base_model.model.model.layers.1").register_forward_hook(
        lambda _module, _args, output: seen.append(output)
    )
    with torch.no_grad(), observe(model, lambda event: hidden.append(event.hidden_states)):
        model(input_ids=ids, attention_mask=mask)
    hook.remove()
    for certificate in certificates:
        torch.testing.assert_close(certificate.x.float(), hidden[0][certificate.token])
        applied = certificate.apply(hidden[0][certificate.token]).float()
        torch.testing.assert_close(applied, seen[0][certificate.token], rtol=1e-4, atol=1e-5)
        assert certificate.check().holds()
    chosen = torch.zeros(2, 7, dtype=torch.bool)
    chosen[0, 4] = True
    [one] = restricted_lora(model, ids, tokens=chosen)
    assert one.token == (0, 4)


def test_with_a_cache_the_mask_is_longer_than_the_input() -> None:
    model, ids = fsrl_model(), token_ids()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :6] = 0
    whole = restricted_lora(model, {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        cache = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
    rest = {"input_ids": ids[:, 5:], "attention_mask": mask, "past_key_values": cache}
    found = restricted_lora(model, rest)
    assert [c.token for c in found] == [(0, 1), (1, 0), (1, 1)]
    places = {c.token: c for c in whole}
    for certificate in found:
        row, column = certificate.token
        torch.testing.assert_close(certificate.x, places[row, column + 5].x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`tokens` of shape \(2, 7\).*got \(2, 9\)"):
        restricted_lora(model, ids, tokens=torch.ones(2, 9))


def test_several_layers() -> None:
    hooks = {layer: {"hook_name": f"blocks.{layer}.hook_resid_post"} for layer in (0, 2)}
    saes = {layer: tiny_sae(seed=layer, metadata=hook) for layer, hook in hooks.items()}
    model = fsrl_model(layer=[0, 2], sae=saes)
    certificates = restricted_lora(model, token_ids(1, 4))
    names = ["model.layers.0"] * 4 + ["model.layers.2"] * 4
    assert [c.layer_name for c in certificates] == names
    assert all(c.check().holds() for c in certificates)
    only = restricted_lora(model, token_ids(1, 4), layer_name="model.layers.2")
    assert [c.radius for c in only] == [c.radius for c in certificates[4:]]


@pytest.mark.parametrize("bias", [True, False])
def test_on_a_wrapped_linear_it_is_a_lora_on_the_weight(bias: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(10, D_IN, bias=bias, dtype=torch.float64)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.linear(input_ids)

    torch.manual_seed(0)
    net, h = Net(), torch.randn(1, 10, dtype=torch.float64)
    plain = net.linear
    model = fsrl_model(
        net, sae=tiny_sae(dtype="float64"), target_modules=["linear"], task_type=None
    )
    model.double()
    steered = model(h).detach()
    [certificate] = restricted_lora(model, h)
    lora_A, lora_B, constant = certificate.on_linear(plain)
    model.unload()
    assert net.linear is plain
    config = LoraConfig(
        r=len(lora_A), lora_alpha=len(lora_A), target_modules=["linear"], lora_bias=bias
    )
    loaded = get_peft_model(net, config)
    layer = loaded.base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.data = lora_A
        layer.lora_B["default"].weight.data = lora_B
        if bias:
            layer.lora_B["default"].bias.data = constant
    by_peft = loaded(h).detach() + (0 if bias else constant)
    torch.testing.assert_close(by_peft, steered, rtol=1e-10, atol=1e-12)


def test_on_another_module_it_is_no_lora_on_the_weight() -> None:
    # GPT-2's Conv1D has its weight the other way round; a square one would give wrong numbers.
    path = "transformer.h.1.attn.c_proj"
    model = fsrl_model(tiny_model("gpt2"), target_modules=[path])
    certificate = restricted_lora(model, token_ids(1, 2))[0]
    with pytest.raises(TypeError, match=r"Expected the nn.Linear that is steered.*got Conv1D"):
        certificate.on_linear(model.base_model.model.get_submodule(path).base_layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_have_exact_certificates(dtype: torch.dtype) -> None:
    model = fsrl_model(tiny_model().to(dtype), sae_dtype="bfloat16")
    certificates = restricted_lora(model, token_ids(1, 5))
    for certificate in certificates:
        assert certificate.lora_A.dtype == torch.float64
        check = certificate.check()
        assert check.holds()
        assert 1e-4 < check.own_error < 0.05


def test_the_models_own_error_is_that_of_the_change() -> None:
    # The change is a hundredth of the token, and all but as small as bfloat16's rounding of it.
    model = fsrl_model(tiny_model().to(torch.bfloat16), sae_dtype="float32")
    adapter = only_layer(model).fsrl_adapter["default"]
    with torch.no_grad():
        adapter.weight.mul_(0.0002)
        adapter.bias.zero_()
        adapter.threshold.zero_()
    seen: list[Tensor] = []
    layer = model.get_submodule("base_model.model.model.layers.1")
    with torch.no_grad():
        handle = layer.register_forward_hook(lambda _module, _args, output: seen.append(output))
        certificates = restricted_lora(model, token_ids(1, 5))
        handle.remove()
    for certificate in certificates:
        own = seen[0][certificate.token].double()
        change = certificate.apply(certificate.x) - certificate.x
        expected = float((own - certificate.x - change).norm() / change.norm())
        assert certificate.check().own_error == pytest.approx(expected, rel=0.3)
        of_the_output = relative(own, certificate.apply(certificate.x))
        assert certificate.check().own_error > 0.05 > 10 * of_the_output


def dense_layer(scale: float) -> FSRLLayer:
    """One that steers every feature at every token a little, so that pieces are tiny."""
    sae = tiny_sae("jumprelu", dtype="float64", d_in=64, d_sae=1024)
    layer = bare_layer(sae)
    adapter = layer.fsrl_adapter["default"]
    with torch.no_grad():
        adapter.weight.mul_(scale)
        adapter.bias.mul_(scale)
        adapter.threshold.zero_()
    return layer


def test_tiny_pieces_of_a_dense_adapter_hold() -> None:
    layer = dense_layer(1e-5)
    hidden = 0
    for certificate in certify(layer, 50 * tokens(5, d_in=64)):
        x = certificate.x
        assert 0 < certificate.radius < 1e-3 * x.norm()
        assert len(certificate.active) > 300
        check = certificate.check()
        assert check.holds()
        further = x + 1.01 * certificate.radius * certificate.direction
        hidden += relative(certificate.apply(further), layer(further)) < 1e-10
        for factor in (0.9, 1.1):
            wrong = dataclasses.replace(certificate, radius=factor * certificate.radius)
            assert not wrong.check().holds()
    # A fixed tolerance of 1e-10 of the output would have missed the break.
    assert hidden >= 3


def test_a_radius_that_rounding_all_but_hides() -> None:
    layer = dense_layer(1e-5)
    [certificate] = certify(layer, tokens(1, d_in=64))
    near = certificate.x + (1 - 1e-9) * certificate.radius * certificate.direction
    [there] = certify(layer, near[None])
    assert there.radius < 1e-10 * near.norm()
    check = there.check()
    assert check.holds()
    # Visible, though not at 1 % of this radius.
    assert check.outside_error > 100 * check.rounding


def test_certificates_keep_no_factors() -> None:
    found = certify(dense_layer(1.0), tokens(6, d_in=64), output=tokens(6, d_in=64))
    assert len({id(certificate._map) for certificate in found}) == 1
    for certificate in found:
        tensors = [each for each in vars(certificate).values() if isinstance(each, Tensor)]
        held = sum(each.untyped_storage().nbytes() for each in tensors)
        assert held <= 1024 + 4 * 64 * 8 < certificate.lora_A.nbytes / 50
    first = found[0]
    assert torch.equal(first.lora_A, first.lora_A)
    assert first.lora_A.shape == (len(first.active) + len(first.clipped), 64)


def test_a_contextual_encoder_where_it_is_not_needed() -> None:
    # Matching pursuit is certified at the tokens where nothing is suppressed.
    layer = bare_layer(tiny_sae("matching_pursuit", dtype="float64"))
    with torch.no_grad():
        layer.fsrl_adapter["default"].bias.add_(1.0)
        layer.fsrl_adapter["default"].threshold.add_(1.5)
    with pytest.raises(
        NotAffineError, match=r"of 20 tokens have no certificate\. Token"
    ) as refused:
        certify(layer, tokens(20))
    left = [[i] for i in range(20) if (i,) not in refused.value.tokens]
    assert 0 < len(left) < 20
    certificates = certify(layer, tokens(20), tokens=torch.tensor(left))
    assert [list(c.token) for c in certificates] == left
    assert any(c.active for c in certificates)
    assert all(c.check().holds() for c in certificates)


def test_refusals() -> None:
    model = fsrl_model()
    ids = token_ids()
    with ablate_features(model, [1]), pytest.raises(ValueError, match="is being edited"):
        restricted_lora(model, ids)
    with model.disable_adapter(), pytest.raises(ValueError, match="No adapter acted"):
        restricted_lora(model, ids)
    with pytest.raises(ValueError, match="found `adapter_names`"):
        restricted_lora(model, {"input_ids": ids, "adapter_names": ["default"] * 2})
    for ids_of_another_kind in ([1, 2, 3], {"input_ids": [[1, 2, 3]]}, None, "text", {}):
        with pytest.raises(TypeError, match="Expected a mapping with `input_ids`") as refused:
            restricted_lora(model, ids_of_another_kind)
        assert len(str(refused.value)) < 300
    with pytest.raises(ValueError, match=r"shape \(batch, seq\), got \(7,\)"):
        restricted_lora(model, ids[0])
    with pytest.raises(ValueError, match=r"No FSRL adapter wraps 'x'; found \['model.layers.1'\]"):
        restricted_lora(model, ids, layer_name="x")
    with pytest.raises(ValueError, match="has no FSRL adapter"):
        restricted_lora(tiny_model(), ids)
    layer = bare_layer(tiny_sae())
    layer.enable_adapters(False)
    with pytest.raises(ValueError, match="No adapter is active at 'identity'"):
        certify(layer, tokens())
    # What was refused left nothing behind.
    assert len(restricted_lora(model, ids)) == ids.numel()


def test_normalization_is_named_before_any_token_is_looked_at() -> None:
    model = fsrl_model(sae=tiny_sae("standard", "layer_norm"))
    with pytest.raises(NotAffineError, match="normalize_activations='layer_norm'"):
        restricted_lora(model, token_ids())


def project_on_both(normals: Tensor, gaps: Tensor, rounds: int = 800) -> Tensor:
    """The point nearest to zero with ``normals @ y >= gaps``, by Dykstra's projections."""
    y, corrections = torch.zeros_like(normals[0]), torch.zeros_like(normals)
    for step in range(rounds):
        i = step % len(normals)
        start = y + corrections[i]
        lack = (gaps[i] - normals[i] @ start).clamp(min=0)
        y = start + lack * normals[i] / normals[i].square().sum()
        corrections[i] = start - y
    return y


def test_distances_to_two_half_spaces_by_alternating_projections() -> None:
    n, d = 20, 4
    first, second = tokens(n, 1, d), tokens(n, 2, d)
    p, q = tokens(n, 3, 1)[:, 0], tokens(n, 4, 1)[:, 0]
    geometry = Geometry({"u": first, "z": second})
    exit = Exit("both", torch.ones(n, dtype=torch.bool), (Half("u", -1, p), Half("z", 1, q)))
    distances, known = geometry.distance(exit, {})
    assert known.all()
    on_edge = 0
    for i in range(n):
        nearest = project_on_both(torch.stack([-first[i], second[i]]), torch.stack([p[i], q[i]]))
        assert float(distances[i]) == pytest.approx(float(nearest.norm()), rel=1e-6, abs=1e-9)
        singles = torch.stack([p[i] / first[i].norm(), q[i] / second[i].norm()])
        on_edge += float(nearest.norm()) > 1.001 * float(singles.max().clamp(min=0))
        if nearest.any():
            step = nearest / nearest.norm()
            towards, into = geometry.direction(exit, i)
            torch.testing.assert_close(towards, step, rtol=1e-5, atol=1e-6)
            inside = nearest + 0.01 * nearest.norm() * into
            assert inside.norm() <= 1.01 * nearest.norm() * (1 + 1e-9)
            assert -first[i] @ inside > p[i]
            assert second[i] @ inside > q[i]
    assert 3 < on_edge < n - 3


def test_distances_where_a_row_is_zero_or_unknown() -> None:
    rows = {"u": torch.zeros(2, 3), "z": torch.ones(2, 3)}
    here = torch.ones(2, dtype=torch.bool)
    gap, inside = torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 0.0])
    geometry = Geometry(rows)
    never, _ = geometry.distance(Exit("u", here, (Half("u", 1, gap),)), {})
    assert never.tolist() == [math.inf, math.inf]
    both = Exit("both", here, (Half("z", 1, gap), Half("u", 1, inside)))
    distance, known = geometry.distance(both, {})
    assert distance.tolist() == [pytest.approx(3**-0.5), math.inf]
    assert known.all()
    bound = torch.tensor([2.0, 0.5])
    distance, known = geometry.distance(both, {"z": bound})
    assert distance.tolist() == [2.0, math.inf]
    assert not known.any()


def one_feature(seed: int, architecture: str = "standard") -> tuple[Any, FSRLLayer]:
    """A layer of width 4 that steers one feature, whose own boundary is then the nearest."""
    sae = tiny_sae(architecture, dtype="float64", seed=seed, d_in=4, d_sae=6)
    layer = FSRLLayer(nn.Identity(), "identity")
    config = FSRLConfig(layer=0, sae=sae, features=[0], l1_coeff=0.0)
    layer.update_layer("default", config, freeze_sae(sae).restrict([0]))
    layer.to(torch.float64)
    randomize_adapter(layer, seed=seed)
    return sae, layer


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
@pytest.mark.parametrize("threshold", [True, False])
def test_what_lies_beyond_an_edge_is_found(architecture: str, threshold: bool) -> None:
    # The ray through the nearest point of an edge may miss what lies behind it.
    missed = 0
    for seed in (3, 14, 19, 24):
        _, layer = one_feature(seed, architecture)
        layer.fsrl_adapter["default"].threshold.data.mul_(threshold)
        for certificate in certify(layer, tokens(8, seed, 4)):
            assert certificate.tight
            assert certificate.check().holds()
            if certificate.radius < math.inf:
                ray = certificate.x + 1.01 * certificate.radius * certificate.direction
                missed += relative(certificate.apply(ray), layer(ray)) < 1e-12
    assert missed > 0 or threshold


@pytest.mark.parametrize("threshold", [True, False])
def test_an_adapter_along_the_encoder_never_suppresses_what_is_there(threshold: bool) -> None:
    # Two opposite half-spaces without a common point are no boundary, and no tight one.
    loose = 0
    for seed in range(4):
        sae, layer = one_feature(seed)
        adapter = layer.fsrl_adapter["default"]
        with torch.no_grad():
            adapter.weight.copy_(0.5 * sae.W_enc.T[:1])
            adapter.threshold.mul_(threshold)
        for certificate in certify(layer, tokens(6, seed, 4)):
            assert certificate.check().holds()
            loose += not certificate.tight
    assert loose > 0


def test_opposite_half_spaces_by_hand() -> None:
    rows = {"u": torch.tensor([[3.0, 0.0]]).double(), "z": torch.tensor([[-2.0, 2e-7]]).double()}
    gap = torch.tensor([1.0]).double()
    apart = Exit("both", torch.tensor([True]), (Half("u", 1, gap), Half("z", 1, gap)))
    distance, known = Geometry(rows).distance(apart, {})
    # 3 y >= 1 and 2e-7 y' >= 1 + 2 y: the edge is at (1 / 3, 8.3e6).
    assert not known.any()
    assert 500 < float(distance) < 8.3e6


def test_a_feature_that_writes_nothing_is_no_boundary() -> None:
    sae = tiny_sae(dtype="float64")
    sae.W_dec.data[::2] = 0
    for certificate in certify(bare_layer(sae), tokens(20)):
        assert certificate.boundary_feature % 2 == 1
        assert certificate.check().holds()


@pytest.mark.parametrize("bias", [1.0, 0.0])
def test_a_token_on_a_boundary_has_no_ball(bias: float) -> None:
    sae = tiny_sae(dtype="float64", apply_b_dec_to_input=False)
    sae.b_enc.data.fill_(bias)
    layer = bare_layer(sae)
    adapter = layer.fsrl_adapter["default"]
    adapter.bias.data.copy_(-adapter.threshold)
    [certificate] = certify(layer, torch.zeros(1, D_IN, dtype=torch.float64))
    assert certificate.radius == 0
    assert certificate.boundary == "suppression"
    assert certificate.check().holds()
