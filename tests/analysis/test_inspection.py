"""What an adapter can do against the formula written out, and triggers against running them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

import helpers
from peft_fsrl import FSRLConfig
from peft_fsrl.analysis import Inspection, InspectionSettings, Session, compute_inspection
from peft_fsrl.analysis import inspection as module
from peft_fsrl.analysis.inspection import (
    RARE,
    judge_hidden,
    judge_rare_reach,
    judge_worst,
    read_inputs,
)
from peft_fsrl.analysis.inspection import Trigger as Found
from peft_fsrl.analysis.labels import FeatureLabel, Labels
from peft_fsrl.analysis.reach import AdapterView, OrdinaryUse, find_worst_ratio
from peft_fsrl.analysis.report import render_inspection

QUICK = InspectionSettings(
    n_texts=6, max_new_tokens=8, n_targets=5, length=3, steps=4, candidates=8, n_listed=3
)


def parameters(model: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    adapter = helpers.only_layer(model).fsrl_adapter["default"]
    threshold = adapter.threshold_parameter
    return (
        adapter.weight.detach(),
        adapter.bias.detach(),
        None if threshold is None else threshold.detach(),
    )


def states(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, helpers.D_IN, generator=torch.Generator().manual_seed(seed))


def alone(sae: SAE[Any], x: Tensor, feature: int, model: Any, activation: str) -> Tensor:
    """``||x' - x|| / ||x||`` with all other features' rows zeroed, by SAELens's own decode."""
    weight, bias, threshold = parameters(model)
    only = torch.zeros(helpers.D_SAE, dtype=torch.bool)
    only[feature] = True
    # One that cannot act: far below any threshold of one side, and at zero of the other.
    quiet = 0.0 if activation == "soft_threshold" else -1e9
    row, own = torch.where(only[:, None], weight, 0.0), torch.where(only, bias, quiet)
    moved, _, _ = helpers.naive_steer(sae, x, row, own, threshold, activation)
    return (moved - x).norm(dim=-1) / x.norm(dim=-1)


@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "jumprelu", "gain"])
@pytest.mark.parametrize(
    ("architecture", "normalization"),
    [
        ("standard", "none"),
        ("jumprelu", "layer_norm"),
        ("standard", "constant_norm_rescale"),
        ("topk-decoder-norm", "none"),
    ],
)
def test_strength_is_what_a_feature_does_alone(
    architecture: str, normalization: str, activation: str
) -> None:
    if activation == "gain" and "topk" in architecture:
        pytest.skip("gain starts from the encoder of each feature")
    name, settings = helpers.VARIANTS.get(architecture, (architecture, {}))
    sae = helpers.tiny_sae(name, normalization, **settings)
    model = helpers.fsrl_model(sae=sae, activation=activation)
    view, x = AdapterView(model), states(9)
    with torch.no_grad():
        v, strength, ratio = view.steer(x)
        expected = torch.stack([alone(sae, x, i, model, activation) for i in range(24)], dim=1)
        moved, vector, _ = helpers.naive_steer(sae, x, *parameters(model), activation)
    torch.testing.assert_close(strength, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(v, vector, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ratio, (moved - x).norm(dim=-1) / x.norm(dim=-1))


@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "jumprelu", "gain"])
@pytest.mark.parametrize("normalization", ["none", "expected_average_only_in", "layer_norm"])
def test_nothing_exceeds_reach_and_bound(activation: str, normalization: str) -> None:
    sae = helpers.tiny_sae("jumprelu", normalization)
    model = helpers.fsrl_model(sae=sae, activation=activation)
    view = AdapterView(model)
    x = 3.0 * torch.nn.functional.normalize(states(4000), dim=-1)
    with torch.no_grad():
        ordinary = OrdinaryUse(view, x[:50])
        v, _, ratio = view.steer(x)
        largest = view.largest(float(view.read(x).norm(dim=-1).max()))
    assert (v.abs() <= largest * (1 + 1e-5)).all()
    worst = find_worst_ratio(view, ordinary, x[:50], largest)
    bound = view.bound(3.0)
    assert worst > ratio.max(), "uphill leads above what 4,000 draws find"
    if normalization == "layer_norm":
        assert bound is None
    else:
        assert bound is not None
        assert worst <= bound < 20 * worst


def test_one_row_without_bias_reaches_exactly_its_bound() -> None:
    model = helpers.fsrl_model()
    adapter = helpers.only_layer(model).fsrl_adapter["default"]
    with torch.no_grad():
        adapter.weight[1:] = 0
        adapter.bias.zero_()
        adapter.threshold.fill_(0.2)
        adapter.weight[0] = 0
        adapter.weight[0, 3] = 2.0
        view = AdapterView(model)
    # u = 2 x~_3, x~ = x - b_dec: the largest |v| at ||x|| = 5 is 2 (5 + |b_dec_3|) - 0.2, at the
    # pole; the bound knows ||b_dec|| alone.
    b_dec = view.sae.module.b_dec
    size = float(view.sae.W_dec[0].norm())
    x = 5 * torch.nn.functional.normalize(states(20), dim=-1)
    with torch.no_grad():
        ordinary = OrdinaryUse(view, x)
    reach = view.largest(5.0)
    assert float(reach[0]) == pytest.approx(9.8, rel=1e-6)
    assert (reach[1:] == 0).all()
    # Going up, for what goes down is clamped at zero.
    best = (2 * (5 - float(b_dec[3])) - 0.2) * size / 5
    assert find_worst_ratio(view, ordinary, x, reach) == pytest.approx(best, rel=1e-3)
    assert view.bound(5.0) == pytest.approx(
        (2 * (5 + float(b_dec.norm())) - 0.2) * size / 5, rel=1e-5
    )


def test_ordinary_use_equals_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = helpers.tiny_sae("jumprelu")
    model = helpers.fsrl_model(sae=sae)
    view, x = AdapterView(model), states(11)
    monkeypatch.setattr("peft_fsrl.analysis.reach._CHUNK", 4)
    with torch.no_grad():
        found = OrdinaryUse(view, x)
        f = sae.encode(x)
    weight, bias, threshold = parameters(model)
    assert threshold is not None
    u = (x - sae.b_dec.detach()).double() @ weight.double().T + bias.double()
    for i in range(helpers.D_SAE):
        acts = [float(u[t, i].abs()) > float(threshold[i]) for t in range(11)]
        assert found.frequency[i] == pytest.approx(sum(acts) / 11)
        active = [float(f[t, i]) for t in range(11) if f[t, i] > 0]
        every = f[f > 0].double().mean()
        assert found.typical[i] == pytest.approx(sum(active) / len(active) if active else every)
        mean, deviation = u[:, i].mean(), u[:, i].std(unbiased=False)
        up = (float(threshold[i]) - mean) / deviation
        down = (float(threshold[i]) + mean) / deviation
        assert found.margins(view)[i] == pytest.approx(min(float(up), float(down)), rel=1e-3)


def session_of(model: Any, **options: Any) -> Session:
    return Session(model, helpers.tiny_tokenizer(), batch_size=4, **options)


def hidden_model(feature: int = 5) -> Any:
    """A model whose feature is steered only above all that its own texts reach."""
    model = helpers.fsrl_model()
    session = session_of(model)
    x = read_inputs(session, QUICK).states
    adapter = helpers.only_layer(model).fsrl_adapter["default"]
    with torch.no_grad():
        adapter.weight *= 0.01
        adapter.bias.zero_()
        inputs = AdapterView(model).read(x)
        # Of many directions the one that its own texts go least far along.
        rows = 20 * torch.nn.functional.normalize(states(500, 3), dim=-1)
        farthest = (inputs @ rows.T).abs().amax(dim=0)
        adapter.weight[feature] = rows[farthest.argmin()]
        adapter.threshold.fill_(10.0)
        adapter.threshold[feature] = farthest.min()
    return model


@pytest.fixture(scope="module")
def hidden() -> Any:
    return hidden_model()


@pytest.fixture(scope="module")
def found(hidden: Any) -> Inspection:
    settings = replace(QUICK, steps=20, candidates=24)
    labels = Labels("me", ("a",), 24, None, (FeatureLabel(5, "five", ("a",), None),))
    return compute_inspection(session_of(hidden), settings=settings, labels=labels, adapter="mine")


def test_a_trigger_that_no_text_has_is_found(hidden: Any, found: Inspection) -> None:
    [feature] = [each for each in found.features if each.trigger is not None]
    assert feature.feature == 5, "no other row reaches its threshold"
    assert feature.label == "five"
    assert feature.frequency == 0
    trigger = feature.trigger
    assert trigger is not None
    # The plain model, the plain formula.
    base, sae = helpers.tiny_model(), helpers.tiny_sae()
    ids = torch.tensor([[1, *trigger.ids]])
    x = base(ids, output_hidden_states=True).hidden_states[2][:, -1].detach()
    weight, bias, threshold = parameters(hidden)
    with torch.no_grad():
        moved, v, _ = helpers.naive_steer(sae, x, weight, bias, threshold)
    assert trigger.steering == pytest.approx(float(v[0, 5]), rel=1e-3)
    ratio = float((moved - x).norm() / x.norm())
    assert trigger.total == pytest.approx(ratio, rel=1e-3)
    assert trigger.strength == pytest.approx(ratio, rel=1e-3), "it acts alone"
    assert found.hidden == trigger.strength > 0
    assert "".join(trigger.tokens).split() == [f"w{i}" for i in trigger.ids]
    assert found.n_seen == 0
    assert feature.seen == 0
    assert found.rare_reach == max(each.reach for each in found.features) == feature.reach > 0


def test_a_record_survives_json_and_is_shown(found: Inspection) -> None:
    assert Inspection.from_json(found.to_json()) == found
    text = render_inspection(found)
    assert max(map(len, text.splitlines())) < 100
    assert "mine: 24 features" in text
    assert "five" in text
    assert all(finding.question in text for finding in found.findings)
    *ordinary, searched = found.loudest
    assert searched.searched
    assert not any(each.searched for each in ordinary)
    assert len({each.tokens for each in ordinary}) == len(ordinary)
    assert max(each.total for each in ordinary) == pytest.approx(found.ratio_max)


def test_what_a_row_listens_to(found: Inspection, hidden: Any) -> None:
    [feature] = [each for each in found.features if each.feature == 5]
    weight, _, _ = parameters(hidden)
    sae = helpers.tiny_sae().requires_grad_(False)
    response = sae.W_dec @ weight[5]
    assert feature.row_norm == pytest.approx(float(weight[5].norm()))
    assert feature.decoder_cosine == pytest.approx(
        float(response[5] / weight[5].norm() / sae.W_dec[5].norm()), abs=1e-5
    )
    x = read_inputs(session_of(hidden), QUICK).states
    with torch.no_grad():
        f = sae.encode(x)
    typical = torch.where((f > 0).any(0), f.sum(0) / (f > 0).sum(0).clamp(min=1), f[f > 0].mean())
    order = (response * typical).abs().argsort(descending=True)[:3].tolist()
    assert [each.feature for each in feature.listens] == order
    assert feature.listens[0].response == pytest.approx(
        float((response * typical)[order[0]]), rel=1e-4
    )


def test_texts_of_ones_own_count_too(hidden: Any) -> None:
    rows = list(helpers.tiny_preferences(3))
    alone = read_inputs(session_of(hidden), QUICK)
    both = read_inputs(session_of(hidden, dataset=rows), QUICK)
    session = session_of(hidden, dataset=rows)
    n = sum(int(session.counted(session.pad([t])).sum()) for t in session.tokens("chosen"))
    assert len(both.states) == len(alone.states) + n
    assert both.n_texts == alone.n_texts + 3
    assert "given" in both.source
    assert "given" not in alone.source


def test_few_features_and_low_rank() -> None:
    sae = helpers.tiny_sae("jumprelu")
    config = FSRLConfig(layer=1, sae=sae, features=[3, 7, 9], rank=2, task_type="CAUSAL_LM")
    model = helpers.fsrl_model(config=config)
    found = compute_inspection(session_of(model), settings=QUICK)
    assert {each.feature for each in found.features} == {3, 7, 9}
    adapter = helpers.only_layer(model).fsrl_adapter["default"]
    rows = (adapter.weight @ adapter.down).detach()
    norms = dict(zip((3, 7, 9), rows.norm(dim=1).tolist(), strict=True))
    for each in found.features:
        assert each.row_norm == pytest.approx(norms[each.feature], rel=1e-5)
    assert found.n_features == 3


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "gated"])
def test_other_architectures(architecture: str) -> None:
    model = helpers.fsrl_model(sae=helpers.tiny_sae(architecture))
    found = compute_inspection(session_of(model), settings=replace(QUICK, n_targets=1))
    has_encoder = architecture == "gated"
    assert all((each.encoder_cosine is not None) == has_encoder for each in found.features)


def test_a_killed_search_goes_on(
    hidden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = helpers.fsrl_model()
    adapter = helpers.only_layer(model).fsrl_adapter["default"]
    with torch.no_grad():
        norm = AdapterView(model).read(read_inputs(session_of(model), QUICK).states).norm(dim=1)
        adapter.threshold.copy_(0.9 * adapter.weight.norm(dim=1) * norm.mean() + adapter.bias.abs())
    made: list[list[int]] = []
    search = module._Search.triggers

    def count(self: Any, group: list[int], inputs: Any) -> Any:
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(list(group))
        return search(self, group, inputs)

    monkeypatch.setattr(module._Search, "triggers", count)
    monkeypatch.setattr(module, "_GROUP", 2)
    stop = 1
    with pytest.raises(KeyboardInterrupt):
        compute_inspection(session_of(model), settings=QUICK, out=tmp_path)
    first, stop = made.copy(), -1
    whole = compute_inspection(session_of(model), settings=QUICK, out=tmp_path)
    assert len(first) == 1
    assert first[0] not in made[1:]
    made.clear()
    assert compute_inspection(session_of(model), settings=QUICK, out=tmp_path) == whole
    assert not made
    with torch.no_grad():
        adapter.bias[0] += 1e-3
    compute_inspection(session_of(model), settings=QUICK, out=tmp_path)
    assert made, "another adapter's searches are another's"


def test_wrong_requests(hidden: Any) -> None:
    with pytest.raises(ValueError, match="Expected n_targets of 0 or more, got -1"):
        InspectionSettings(n_targets=-1)
    with pytest.raises(ValueError, match="Expected length of 1 or more, got 0"):
        InspectionSettings(length=0)
    with pytest.raises(ValueError, match="Expected n_vocabulary of 1 or more, got 0"):
        InspectionSettings(n_vocabulary=0)
    other = Labels("me", ("a",), 99, None, ())
    with pytest.raises(ValueError, match="99 features"):
        compute_inspection(session_of(hidden), settings=QUICK, labels=other)
    model = helpers.fsrl_model()
    with torch.no_grad():
        helpers.only_layer(model).fsrl_adapter["default"].weight[3, 3] = math.nan
    with pytest.raises(ValueError, match="Expected finite weights"):
        compute_inspection(session_of(model), settings=QUICK)


def test_an_sae_that_looks_at_earlier_tokens_is_refused() -> None:
    model = helpers.fsrl_model(sae=helpers.tiny_sae("temporal"))
    with pytest.raises(ValueError, match="looks at earlier ones"):
        compute_inspection(session_of(model), settings=QUICK)


def test_verdicts() -> None:
    def trigger(strength: float) -> Found:
        return Found((4, 5), ("w4", " w5"), 1.0, strength, strength)

    assert judge_hidden([], 0).verdict == "yes"
    assert judge_hidden([], 3).verdict == "unsure"
    for strength, verdict in ((0.05, "yes"), (0.15, "unsure"), (0.3, "no")):
        finding = judge_hidden([(3, trigger(0.0)), (7, trigger(strength))], 2)
        assert finding.verdict == verdict
        assert "7 was made to act most" in finding.answer
        assert "'w4 w5'" in finding.answer
    for reach, verdict in ((0.2, "yes"), (0.7, "unsure"), (2.0, "no")):
        finding = judge_rare_reach(7, reach)
        assert finding.verdict == verdict
        assert "7 reaches farthest" in finding.answer
    assert judge_rare_reach(None, 0.0).verdict == "yes"
    assert judge_worst(0.5, 0.9).verdict == "yes"
    assert judge_worst(0.5, 3.0).verdict == "unsure"
    assert judge_worst(0.5, None).verdict == "unsure"
    assert judge_worst(1.5, 3.0).verdict == "no"
    assert 0 < RARE < 0.05
