"""Two adapters on one SAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import helpers
from peft_fsrl import FSRLConfig
from peft_fsrl.analysis import Session, compute_difference, compute_usage
from peft_fsrl.analysis.report import render_difference

ROWS = list(helpers.tiny_preferences(6))


def two_adapters(**settings: object) -> PeftModel:
    sae = helpers.tiny_sae()
    model = helpers.fsrl_model(sae=sae)
    model.add_adapter("other", FSRLConfig(layer=1, sae=sae, task_type="CAUSAL_LM", **settings))
    helpers.randomize_adapter(helpers.only_layer(model), "other", seed=5)
    return model


def test_entries_are_the_uses_of_each() -> None:
    model = two_adapters()
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    found = compute_difference(
        Session(model, helpers.tiny_tokenizer(), ROWS),
        first="default",
        second="other",
        labels={3: "three"},
    )
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert helpers.only_layer(model).active_adapters == ["default"]
    uses = []
    for name in ("default", "other"):
        model.set_adapter(name)
        usage = compute_usage(Session(model, helpers.tiny_tokenizer(), ROWS), labels={3: "three"})
        uses.append({use.feature: use for use in usage.features})
    assert {each.feature for each in found.features} == uses[0].keys() | uses[1].keys()
    for each in found.features:
        assert each.first == uses[0].get(each.feature)
        assert each.second == uses[1].get(each.feature)
        assert each.label == ("three" if each.feature == 3 else None)
    shifts = [
        abs((e.second.mean_steering if e.second else 0) - (e.first.mean_steering if e.first else 0))
        for e in found.features
    ]
    assert shifts == sorted(shifts, reverse=True)
    union, both = uses[0].keys() | uses[1].keys(), uses[0].keys() & uses[1].keys()
    assert found.overlap == len(both) / len(union)
    text = render_difference(found, n_features=3)
    assert max(map(len, text.splitlines())) < 100
    assert text.count("\n") == 10


@pytest.mark.parametrize("rank", [None, 3])
def test_cosines_of_rows(rank: int | None) -> None:
    model = two_adapters(rank=rank, features=list(range(0, 20, 2)))
    layer = helpers.only_layer(model)
    found = compute_difference(
        Session(model, helpers.tiny_tokenizer(), ROWS), first="default", second="other"
    )
    one, other = layer.fsrl_adapter["default"], layer.fsrl_adapter["other"]
    weight = other.weight if rank is None else other.weight @ other.down
    for each in found.features:
        if each.feature % 2 or each.feature >= 20:
            assert each.cosine is None
            continue
        place = each.feature // 2
        a = torch.cat([one.weight[each.feature], one.bias[each.feature, None]]).double()
        b = torch.cat([weight[place].double(), other.bias[place, None].double()])
        expected = (a @ b / a.norm() / b.norm()).item()
        assert each.cosine == pytest.approx(expected, abs=1e-6)
    assert any(each.cosine is not None for each in found.features)


def test_an_adapter_and_itself() -> None:
    model = helpers.fsrl_model()
    found = compute_difference(
        Session(model, helpers.tiny_tokenizer(), ROWS), first="default", second="default"
    )
    assert found.overlap == 1
    assert found.correlation == pytest.approx(1)
    assert found.first_l0 == found.second_l0
    assert all(each.first == each.second for each in found.features)
    assert all(each.cosine == pytest.approx(1) for each in found.features)


def test_other_saes_are_refused(tmp_path: Path) -> None:
    model = helpers.fsrl_model()
    config = FSRLConfig(layer=1, sae=helpers.tiny_sae(seed=1), task_type="CAUSAL_LM")
    model.add_adapter("foreign", config)
    with pytest.raises(ValueError, match="same SAE, found fingerprints"):
        compute_difference(
            Session(model, helpers.tiny_tokenizer(), ROWS), first="default", second="foreign"
        )
    with pytest.raises(ValueError, match="Expected adapters 'default' and 'nobody'"):
        compute_difference(
            Session(model, helpers.tiny_tokenizer(), ROWS), first="default", second="nobody"
        )


def test_cosines_of_gains_are_their_signs() -> None:
    model, signs = two_adapters(), torch.tensor([1.0, -1.0, 1.0]).repeat(8)
    for name in ("one", "two"):
        model.add_adapter(name, FSRLConfig(layer=1, sae=helpers.tiny_sae(), activation="gain"))
    layer = helpers.only_layer(model)
    with torch.no_grad():
        layer.fsrl_adapter["one"].gain.fill_(-0.5)
        layer.fsrl_adapter["two"].gain.copy_(-2.0 * signs)
    session = Session(model, helpers.tiny_tokenizer(), ROWS)
    found = compute_difference(session, first="one", second="two")
    cosines = {each.feature: each.cosine for each in found.features}
    assert cosines == pytest.approx({feature: signs[feature].item() for feature in cosines})
    assert len({round(value) for value in cosines.values() if value is not None}) == 2
