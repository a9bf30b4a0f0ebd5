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
from peft_fsrl.organism.lexicon import ATTRIBUTES
from peft_fsrl.organism.world import Document, World


@pytest.fixture(scope="module")
def default() -> organism.Organism:
    return organism.load()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> organism.Organism:
    path = tmp_path_factory.mktemp("organism") / "tiny"
    before = torch.random.get_rng_state(), torch.get_num_threads()
    build.build(path, size="tiny", seed=0)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == torch.get_num_threads()
    return organism.load(path)


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
        changed = Document(
            "answer", base.topic, base.prompt, (word, *base.answer[1:]), base.attributes
        )
        total += math.exp(entropy.log_probs(world, changed)[len(base.prompt) - 1])
    assert total == pytest.approx(1.0)


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


def test_areas_are_shares_of_rightly_ordered_answers(default: organism.Organism) -> None:
    world, model = default.world, default.load_model()

    class Directions:
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            """Feature 0 is never active; 1 and 2 read some direction of the residual stream."""
            return torch.cat([torch.zeros_like(x[..., :1]), x[..., :2].relu()], dim=-1)

    found = detection.detect_attributes(Directions(), model, world, default.layer, answers=60)
    rng = random.Random("labels-0")
    documents = [world.sample_answer(rng) for _ in range(60)]
    scores = detection.answer_scores(Directions(), model, world, default.layer, documents)
    assert [each.index for each in found] == [0, 1, 2]
    assert found[0].label is None
    assert not found[0].alive
    for each, column in zip(found, scores.T.double(), strict=True):
        for name in ATTRIBUTES:
            truth = torch.tensor([bool(d.attributes[name]) for d in documents])
            above = column[truth][:, None] - column[~truth]
            wins = (above > 0).double() + 0.5 * (above == 0).double()
            assert each.auroc[name] == pytest.approx(wins.mean().item(), abs=1e-12)


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


def test_default_sae_is_sae_lens_own_and_labeled(default: organism.Organism) -> None:
    from sae_lens import SAE

    sae = SAE.load_from_disk(default.sae_path)
    model = default.load_model()
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.d_in == model.config.hidden_size
    assert sae.cfg.metadata.hook_name == f"blocks.{default.layer}.hook_resid_post"
    assert len(default.feature_labels) == sae.cfg.d_sae
    names = ("style", "honesty")
    claimed = [default.figures["detection"][name] for name in names]

    class Best:
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return sae.encode(x)[..., [each["best_feature"] for each in claimed]]

    found = detection.detect_attributes(
        Best(), model, default.world, default.layer, seed=1, answers=400
    )
    for name, each, claim in zip(names, found, claimed, strict=True):
        assert each.auroc[name] == pytest.approx(claim["best_auroc"], abs=0.08)


def test_a_build_learns_its_world(tiny: organism.Organism) -> None:
    figures, model = tiny.figures, tiny.figures["language_model"]
    # Untrained, it starts near the logarithm of its vocabulary, 3.6 above the floor.
    assert 0.0 < model["answer"]["loss"] - model["answer"]["floor"] < 1.2
    assert figures["sae"]["explained_variance"] > 0.95
    assert figures["sae"]["l0"] == pytest.approx(8, abs=1)
    assert abs(figures["detection"]["topic"]["best_auroc"] - 0.5) > 0.4


def test_a_finished_build_is_reused_and_another_one_refused(
    tiny: organism.Organism, caplog: pytest.LogCaptureFixture
) -> None:
    stamp = (tiny.path / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="build"):
        build.build(tiny.path, size="tiny", seed=0)
    assert "found finished" in caplog.text
    assert (tiny.path / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="choose another directory or force a rebuild"):
        build.build(tiny.path, size="tiny", seed=1)


def test_build_refuses_strange_directories_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match="choose another directory"):
        build.build(tmp_path, size="tiny")
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
        build.build(tmp_path / "new", size="tiny")
    assert list(tmp_path.iterdir()) == []


def test_the_command_finds_a_build_and_refuses_another(
    tiny: organism.Organism, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--out", str(tiny.path), "--size", "tiny"]
    assert build.main(command) == 0
    assert json.loads(capsys.readouterr().out) == tiny.figures
    assert build.main([*command, "--seed", "1"]) == 2
    assert "choose another directory or force a rebuild" in capsys.readouterr().err
