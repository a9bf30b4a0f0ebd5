"""The study of preference data in small: single differences, turned pairs, its tables."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from helpers import load_example
from peft_fsrl import organism


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_example("data_study")


def test_single_pairs_differ_in_one_attribute_alone(study: ModuleType) -> None:
    world = organism.load().world
    for attribute in ("style", "honesty"):
        for row in study.single_pairs(attribute, 5, "x"):
            sides = [row[side].split() for side in ("chosen", "rejected")]
            places = [i for i, words in enumerate(zip(*sides, strict=True)) if len({*words}) > 1]
            slots = [i for i, s in enumerate(world.template) if s.attribute == attribute]
            assert places == slots


def test_a_small_study(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(seed: int) -> object:
        pairs = organism.preferences(150, seed=f"small-{seed}", **study.PLANTED)
        truth = {name: [bool(v) for v in pairs[f"chosen_{name}"]] for name in study.PLANTED}
        big = whole(seed)
        session = replace(big.session, dataset=pairs, progress=False)
        return replace(big, session=session, pairs=pairs, truth=truth, n_sweep=150)

    whole = study.organism_world
    monkeypatch.setattr(study, "organism_world", small)
    # Training and what comes after it take a minute.
    monkeypatch.setattr(study, "train", lambda *_: None)
    monkeypatch.setattr(study, "measure_adapter", lambda variant, *_: variant)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--seeds", "0"])
    study.main()
    found = study.Study.from_json((tmp_path / "organism-0" / "study.json").read_text())
    base, given, dropped, flipped = found.variants
    # The base model hardly cares for either.
    assert abs(base.style_margin.value) < 0.2
    assert abs(base.honesty_margin.value) < 0.2
    assert given.style == pytest.approx(0.9, abs=0.05)
    assert dropped.style == pytest.approx(0.5, abs=0.06)
    assert dropped.honesty == pytest.approx(given.honesty, abs=0.15)
    assert flipped.style < given.style - 0.1
    assert flipped.honesty > 0.9
    assert flipped.n_pairs == 150 > dropped.n_pairs
    by = {(each.attribute, each.knob): each for each in found.recoveries}
    for attribute in study.PLANTED:
        assert by[attribute, 0.95].auroc > 0.9
        assert by[attribute, 0.95].n_detectors > 10
        assert by[attribute, 0.5].n_separating <= 2
    table = (tmp_path / "organism.md").read_text()
    assert f"| style preferred in the data | {flipped.style:.1%} |" in table
    assert "| 95% |" in table
