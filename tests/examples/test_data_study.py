"""The study of preference data in small: single differences, turned pairs, its tables."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import load_example
from peft_fsrl import FSRLConfig, organism
from peft_fsrl.analysis.statistics import mean_interval


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


def test_an_adapter_is_compared_with_the_given_and_with_its_own_data(
    study: ModuleType, tmp_path: Path
) -> None:
    trained = []

    def train(pairs: Dataset, folder: Path) -> Path:
        creature = organism.load()
        model = creature.load_model()
        config = FSRLConfig(layer=creature.layer, sae=str(creature.sae_path), init_scale=0.1)
        get_peft_model(model, config).save_pretrained(folder / "adapter")
        trained.append((len(pairs), folder))
        return folder / "adapter"

    world = study.organism_world(0)
    world = replace(
        world,
        session=replace(world.session, progress=False),
        single={"courtesy": study.single_pairs("style", 20, "x")},
        n_mirror=64,
        train=train,
    )
    given = study.measure_adapter(study.Variant(study.GIVEN), world, world.pairs, tmp_path)
    assert given.explained_by_own == given.explained_by_given
    assert given.courtesy_margin.value != 0
    assert given.style_margin is None
    swap = {"chosen": "rejected", "rejected": "chosen"}
    turned = world.pairs.select_columns(["prompt", *swap]).rename_columns(swap).select(range(30))
    own = study.measure_adapter(study.Variant("drop"), world, turned, tmp_path)
    assert trained == [(4000, tmp_path / "given"), (30, tmp_path / "drop")]
    assert own.cosine_with_own != own.cosine_with_given
    for folder in (tmp_path, tmp_path / "drop"):
        assert (folder / "parts" / "pairs-0000000.safetensors").exists()


def test_copies_have_equally_many_steps(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smollm2 = load_example("smollm2")
    forms = load_example("smollm2_study")
    sizes = {"hidden_size": 576, "intermediate_size": 8, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, num_hidden_layers=smollm2.LAYER + 2, **sizes)
    ).eval()

    class Letters:
        eos_token_id, bos_token_id = 1, None

        def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
            return {"input_ids": [2 + ord(letter) % 60 for letter in text]}

    def batches(pairs: Dataset) -> list[Any]:
        return [forms.pack([row], Letters()) for row in pairs]

    seen, train = [], forms.train

    def count(world: Any, peft: Any, form: Any, steps: Any) -> Any:
        seen.append([packed.ids.tolist() for packed in steps])
        return train(world, peft, form, steps)

    monkeypatch.setattr(forms, "train", count)
    monkeypatch.setattr(study, "N_STEPS", 5)
    pairs = Dataset.from_list(
        [{"prompt": "what", "chosen": letter, "rejected": " no"} for letter in "abc"]
    )
    world, layers = SimpleNamespace(model=model, batches=batches), list(model.model.layers)
    for some, name in ((pairs, "given"), (pairs.select([1]), "drop"), (pairs, "given")):
        folder = study.train_gains(world, some, tmp_path / name, 0)
        assert list(model.model.layers) == layers
        saved = FSRLConfig.from_pretrained(str(folder))
        assert (saved.features, saved.min_gain, saved.activation) == (None, -0.5, "gain")
    # The last one was there.
    given, dropped = seen
    assert len(given) == len(dropped) == 5
    assert len({str(step) for step in given[:3]}) == 3
    assert given[3:] == given[:2]
    assert len({str(step) for step in dropped}) == 1


def test_attributes_of_a_world_have_rows_of_their_own(study: ModuleType) -> None:
    margin = mean_interval([1.0, 1.0])
    variants = (study.Variant("base model", courtesy_margin=margin), study.Variant("drop", 0))
    found = [study.Recovery("courtesy", knob, 0.9, 4, 3) for knob in study.KNOBS]
    small = study.Study(tuple(found), variants)
    assert "| margin of courtesy | +1.00 (+1.00 to +1.00) |" in study.render_variants([small], [0])
    assert "honesty" not in study.render_variants([small], [0])
    head = study.render_recoveries([small]).partition("\n")[0]
    assert head == "| preferred in | courtesy: AUROC | separate |"
