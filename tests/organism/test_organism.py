from __future__ import annotations

import itertools
import json
import logging
import math
import random
from pathlib import Path

import pytest
import torch

import build
import detection
import entropy
from language_model import encode_documents, measure_language_model, token_losses
from peft_fsrl import organism
from peft_fsrl.organism.lexicon import ATTRIBUTES, MARKERS
from peft_fsrl.organism.world import World
from tokenizer import build_tokenizer

# Figures of the small build, made with 2 threads and torch 2.13.0. Other machines and versions
# round differently and training amplifies it: hence the tolerances.
SMALL = {
    "loss_above_floor": (0.555, 0.2),
    "explained_variance": (0.911, 0.03),
    "l0": (14.97, 0.5),
}


@pytest.fixture(scope="module")
def default() -> organism.Organism:
    return organism.load()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> organism.Organism:
    path = tmp_path_factory.mktemp("organism") / "small"
    before = torch.random.get_rng_state(), torch.get_num_threads()
    build.build(path, size="small", seed=0)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == torch.get_num_threads()
    return organism.load(path)


# --- the world


@pytest.mark.parametrize("slip", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("seen", [0, 1, 2, 4])
def test_decision_entropy_by_enumeration(slip: float, seen: int) -> None:
    """H(next | earlier) from the joint distribution over every sequence of slots."""

    def joint(bits: tuple[int, ...]) -> float:
        return sum(
            0.5 * math.prod((1 - slip) if bit == z else slip for bit in bits) for z in (0, 1)
        )

    expected = 0.0
    for past in itertools.product((0, 1), repeat=seen):
        for following in (0, 1):
            p = joint((*past, following))
            if p > 0:
                expected -= p * math.log(p / joint(past))
    assert entropy.decision_entropy(seen, slip) == pytest.approx(expected, abs=1e-12)


def test_answer_entropies_match_the_texts() -> None:
    world = World(seed=3)
    rng = random.Random(0)
    texts = [world.sample_answer(rng) for _ in range(4000)]
    scored = torch.tensor([entropy.log_probs(world, t)[-len(t.answer) :] for t in texts])
    floor = torch.tensor(entropy.answer_entropies(world))
    error = scored.std(0) / math.sqrt(len(texts))
    assert torch.all((-scored.mean(0) - floor).abs() <= 5 * error + 1e-6)


def test_log_probs_cover_every_word_and_sum_to_one_over_next_words() -> None:
    world = World(seed=1, topics=2)
    rng = random.Random(0)
    for _ in range(50):
        document = world.sample(rng)
        assert len(entropy.log_probs(world, document)) == len(document.words) - 1
    slot = world.template[0]
    skeleton = world.sample_skeleton(rng)
    base = world.render(skeleton, dict.fromkeys(ATTRIBUTES, 1))
    total = 0.0
    for word in (*world.pool(slot, 0), *world.pool(slot, 1)):
        changed = organism.world.Document(
            "answer", base.topic, base.prompt, (word, *base.answer[1:]), base.attributes
        )
        total += math.exp(entropy.log_probs(world, changed)[len(base.prompt) - 1])
    assert total == pytest.approx(1.0)


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


# --- preferences


@pytest.mark.parametrize("knobs", [{}, {"style": 0.55, "honesty": 0.9}, {"tone": 1.0, "style": 0}])
def test_preferences_honour_their_knobs(
    default: organism.Organism, knobs: dict[str, float]
) -> None:
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
    with pytest.raises(ValueError, match=r"honesty is a probability, expected 0 to 1, got 1\.2"):
        organism.Knobs(honesty=1.2)


def test_conversational_and_plain_pairs_tokenise_alike(default: organism.Organism) -> None:
    tokenizer = default.load_tokenizer()
    plain = default.preferences(20, seed=0)
    messages = default.preferences(20, seed=0, conversational=True)
    for a, b in zip(plain.to_list(), messages.to_list(), strict=True):
        text = tokenizer.apply_chat_template(b["prompt"] + b["chosen"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == [*tokenizer(a["prompt"] + a["chosen"]).input_ids, tokenizer.eos_token_id]


# --- the tokenizer


def test_tokenizer_round_trips(default: organism.Organism) -> None:
    tokenizer = default.load_tokenizer()
    world, rng = default.world, random.Random(0)
    for _ in range(50):
        document = world.sample(rng)
        text = " ".join(document.words)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == encode_documents(world, [document])[0][0].tolist()
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(world.vocabulary())


# --- detection


def test_auroc_against_counting_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 7, generator=generator).relu()
    scores[:, 3] = 0.0
    labels = torch.rand(60, generator=generator) > 0.4
    for column, found in zip(scores.T, detection.auroc(scores, labels), strict=True):
        wins = [
            1.0 if a > b else 0.5 if a == b else 0.0
            for a in column[labels].tolist()
            for b in column[~labels].tolist()
        ]
        assert found.item() == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    with pytest.raises(ValueError, match="both labels"):
        detection.auroc(scores, torch.ones(60, dtype=torch.bool))


def test_answer_scores_are_means_over_the_answer(default: organism.Organism) -> None:
    world, model = default.world, default.load_model()

    class Relu:
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu()

    rng = random.Random(0)
    documents = [world.sample_answer(rng) for _ in range(3)]
    found = detection.answer_scores(Relu(), model, world, default.layer, documents)
    for document, row in zip(documents, found, strict=True):
        ids, _ = encode_documents(world, [document])
        states = model(ids, output_hidden_states=True).hidden_states[default.layer + 1]
        expected = states[0, len(document.prompt) :].relu().mean(0)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_top_features_says_how_many_there_are(default: organism.Organism) -> None:
    assert default.features("style")[:3] == detection.top_features(
        default.feature_labels, "style", 3
    )
    with pytest.raises(ValueError, match="expected 9999 features that detect 'style', found"):
        detection.top_features(default.feature_labels, "style", 9999)
    with pytest.raises(ValueError, match="expected an attribute among"):
        default.features("height")


# --- the shipped build


def test_default_is_small_enough_to_ship(default: organism.Organism) -> None:
    total = sum(f.stat().st_size for f in default.path.rglob("*") if f.is_file())
    assert total < 6 * 2**20


def test_default_language_model_has_the_loss_it_claims(default: organism.Organism) -> None:
    claimed = default.figures["language_model"]
    found = measure_language_model(default.load_model(), default.world, default.manifest["seed"])
    assert found.keys() == claimed.keys()
    for name, figures in found.items():
        assert figures["floor"] == pytest.approx(claimed[name]["floor"], abs=1e-4)
        assert figures["loss"] == pytest.approx(claimed[name]["loss"], abs=2e-3)
    # Below its generator's entropy, a model can only be by luck of the sample.
    assert -0.005 < found["answer"]["loss"] - found["answer"]["floor"] < 0.05
    assert found["honesty/later"]["loss"] < 0.5 * found["honesty/first"]["loss"] + 0.1


def test_default_model_has_no_opinion_before_an_answer_begins(
    default: organism.Organism,
) -> None:
    """Chosen and rejected are equally likely on average: no base rate for SimPO to fit."""
    world, model = default.world, default.load_model()
    rng = random.Random("prior")
    gaps = []
    for _ in range(4):
        for attribute in ATTRIBUTES:
            skeletons = [world.sample_skeleton(rng) for _ in range(32)]
            others = {name: rng.randrange(2) for name in ATTRIBUTES}
            losses = []
            for value in (0, 1):
                texts = [world.render(s, {**others, attribute: value}) for s in skeletons]
                with torch.no_grad():
                    losses.append(token_losses(model, *encode_documents(world, texts)).mean())
            gaps.append((losses[0] - losses[1]).abs().item())
    assert max(gaps) < 0.05


def test_default_sae_is_sae_lens_own_and_labelled(default: organism.Organism) -> None:
    from sae_lens import SAE

    sae = SAE.load_from_disk(default.sae_path)
    model = default.load_model()
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.d_in == model.config.hidden_size
    assert sae.cfg.metadata.hook_name == f"blocks.{default.layer}.hook_resid_post"
    assert len(default.feature_labels) == sae.cfg.d_sae
    labels = detection.feature_labels(sae, model, default.world, default.layer, seed=1, answers=400)
    for name in ("style", "honesty"):
        claimed = default.figures["detection"][name]
        again = labels[claimed["best_feature"]].auroc[name]
        assert again == pytest.approx(claimed["best_auroc"], abs=0.08)


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python tools/organism/build\.py --out"):
        organism.load(tmp_path)


# --- building


def test_small_rebuild_has_the_recorded_figures(small: organism.Organism) -> None:
    figures = small.figures
    above = {
        name: entry["loss"] - entry["floor"] for name, entry in figures["language_model"].items()
    }
    wanted, tolerance = SMALL["loss_above_floor"]
    assert above["answer"] == pytest.approx(wanted, abs=tolerance)
    for name in ("explained_variance", "l0"):
        wanted, tolerance = SMALL[name]
        assert figures["sae"][name] == pytest.approx(wanted, abs=tolerance)
    assert abs(figures["detection"]["style"]["best_auroc"] - 0.5) > 0.4


def test_a_finished_build_is_reused_and_another_one_refused(
    small: organism.Organism, caplog: pytest.LogCaptureFixture
) -> None:
    stamp = (small.path / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="build"):
        build.build(small.path, size="small", seed=0)
    assert "found finished" in caplog.text
    assert (small.path / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="choose another directory or force a rebuild"):
        build.build(small.path, size="small", seed=1)


def test_build_refuses_strange_directories_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match="choose another directory"):
        build.build(tmp_path, size="small")
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
    with pytest.raises(ValueError, match="expected a size among"):
        build.build(tmp_path / "new", size="huge")


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "train_dictionary", interrupt)
    monkeypatch.setattr(build, "train_language_model", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        build.build(tmp_path / "new", size="small")
    assert list(tmp_path.iterdir()) == []


def test_shipped_json_is_readable(default: organism.Organism) -> None:
    for name in ("organism.json", "figures.json", "feature_labels.json"):
        assert json.loads((default.path / name).read_text())
