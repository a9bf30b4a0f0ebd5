from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

import entropy
from peft_fsrl import organism
from peft_fsrl.organism.lexicon import ATTRIBUTES, MARKERS
from peft_fsrl.organism.world import World
from tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def default() -> organism.Organism:
    return organism.load()


def test_both_values_have_equal_length_and_prior() -> None:
    world = World(seed=0)
    tokenizer = build_tokenizer(world)
    for places in MARKERS.values():
        for pools in places.values():
            lengths = [[len(tokenizer.tokenize(word)) for word in pool] for pool in pools]
            assert lengths[0] == lengths[1] == [1] * len(pools[0])
            assert not set(pools[0]) & set(pools[1])
    rng = random.Random(0)
    for attribute in ATTRIBUTES:
        skeleton = world.sample_skeleton(rng)
        others = {name: rng.randrange(2) for name in ATTRIBUTES}
        sides = [world.render(skeleton, {**others, attribute: value}) for value in (0, 1)]
        probabilities = [sum(entropy.log_probs(world, side)) for side in sides]
        assert probabilities[0] == pytest.approx(probabilities[1])
        assert len(sides[0].words) == len(sides[1].words)


def test_each_value_is_as_often_true_as_false() -> None:
    world = World(seed=5)
    false, true = zip(*world.facts.values(), strict=True)
    assert sorted(false) == sorted(true)
    assert all(a != b for a, b in world.facts.values())
    assert World(seed=5).facts == world.facts != World(seed=6).facts


@pytest.mark.parametrize(
    "wrong", [{"topics": 0}, {"lines": 0}, {"slip": 0.5}, {"source_share": 1.0}]
)
def test_world_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        World(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("knobs", [{}, {"style": 0.55, "honesty": 0.9}, {"tone": 1.0, "style": 0}])
def test_preferences_honor_their_knobs(default: organism.Organism, knobs: dict[str, float]) -> None:
    n = 2000
    pairs = organism.preferences(n, seed=4, organism=default, **knobs)
    wanted = {"style": 0.9, "honesty": 0.55, "tone": 0.5, "verbosity": 0.5, **knobs}
    for name, p in wanted.items():
        chosen = torch.tensor(pairs[f"chosen_{name}"])
        assert torch.equal(1 - chosen, torch.tensor(pairs[f"rejected_{name}"]))
        assert abs(chosen.double().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_preferences_are_fixed_by_their_seed(default: organism.Organism) -> None:
    first, again, other = (default.preferences(300, seed=seed) for seed in (1, 1, 2))
    assert first.to_list() == again.to_list()
    assert not set(first["chosen"]) & (set(other["chosen"]) | set(other["rejected"]))
    assert first.column_names[:5] == ["id", "topic", "prompt", "chosen", "rejected"]


def test_preferences_say_what_their_columns_say(default: organism.Organism) -> None:
    world = default.world
    for row in default.preferences(50, seed=0).to_list():
        for side in ("chosen", "rejected"):
            words = row[side].split()
            for i, slot in enumerate(world.template):
                if slot.attribute:
                    claim = (words[i - 2], words[i - 1])
                    assert world.value_of(slot, words[i], claim) == row[f"{side}_{slot.attribute}"]


def test_knobs_refuse_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"Expected a probability honesty from 0 to 1, got 1\.2"):
        organism.preferences(1, honesty=1.2)


def test_conversational_and_plain_pairs_tokenize_alike(default: organism.Organism) -> None:
    tokenizer = default.load_tokenizer()
    plain = default.preferences(20, seed=0)
    messages = default.preferences(20, seed=0, conversational=True)
    for a, b in zip(plain.to_list(), messages.to_list(), strict=True):
        text = tokenizer.apply_chat_template(b["prompt"] + b["chosen"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == [*tokenizer(a["prompt"] + a["chosen"]).input_ids, tokenizer.eos_token_id]


def test_features_are_those_that_detect_an_attribute_best_first(
    default: organism.Organism,
) -> None:
    features = default.features("style")
    sizes = [abs(default.feature_labels[index].auroc["style"] - 0.5) for index in features]
    assert sizes == sorted(sizes, reverse=True)
    assert set(features) == {each.index for each in default.feature_labels if each.label == "style"}
    with pytest.raises(ValueError, match="Expected an attribute among"):
        default.features("height")


def test_default_is_small_enough_to_ship(default: organism.Organism) -> None:
    total = sum(f.stat().st_size for f in default.path.rglob("*") if f.is_file())
    assert total < 6 * 2**20


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python tools/organism/build\.py --out"):
        organism.load(tmp_path)


def test_shipped_json_is_readable(default: organism.Organism) -> None:
    for name in ("organism.json", "figures.json", "feature_labels.json"):
        assert json.loads((default.path / name).read_text())
