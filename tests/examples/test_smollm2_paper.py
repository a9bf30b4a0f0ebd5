"""``examples/smollm2_paper.py`` with the model organism in the place of the real model."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel

from helpers import EXAMPLES
from peft_fsrl import organism
from peft_fsrl.analysis import Session, load_training_curves, score_preferences
from peft_fsrl.steering import observe

KNOBS = {"style": 0.9, "honesty": 0.55}


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("paper", "smollm2", "smollm2_study", "smollm2_paper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import smollm2_paper as script

    class Small:
        """Five steps of two pairs."""

        batches = script.World.batches

        def __init__(self, args: Namespace, name: str, seed: int) -> None:
            creature = organism.load()
            self.knobs, self.batch_size = KNOBS, args.batch_size
            self.tokenizer = creature.load_tokenizer()
            self.model = creature.load_model().requires_grad_(False).eval()
            for part, n in (("train", 10), ("test", 6), ("detect", 12)):
                pairs = creature.preferences(n, seed=part)
                for kind in KNOBS:
                    truth = [bool(value) for value in pairs[f"chosen_{kind}"]]
                    pairs = pairs.add_column(f"{kind}_chosen", truth)
                setattr(self, part, pairs)

        def choose(self, layer: int, sae: str, n: int) -> list[int]:
            # In so few pairs nothing separates.
            return list(range(n))

    creature = organism.load()
    monkeypatch.setattr(script, "World", Small)
    monkeypatch.setattr(script, "LAYER", creature.layer)
    monkeypatch.setattr(script, "SAE", creature.sae_path)
    return script


def bench_in(paper: ModuleType, folder: Path) -> Any:
    names = {"batch_size": 2, "contrast_pairs": 4, "layers": [1, 2]}
    return paper.Bench(Namespace(out=str(folder), saes=str(folder / "{layer}"), **names), seed=0)


def test_runs_are_made_once_and_measured_as_elsewhere(
    paper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_in(paper, tmp_path)
    tmp_path = bench.out
    found = bench.figures(paper.EXCLUSIONS)
    test = bench.world.test
    base = organism.load().load_model()
    session = Session(base, bench.world.tokenizer, test)
    for each in found.values():
        # In bfloat16, pairs packed; here in float32, one answer at a time.
        scores = score_preferences(session)
        assert each["base_loss"]["value"] == pytest.approx(scores.loss, rel=0.02)
    adapters = {
        name: PeftModel.from_pretrained(organism.load().load_model(), tmp_path / name).eval()
        for name in found
    }
    for name, model in adapters.items():
        scores = score_preferences(Session(model, bench.world.tokenizer, test))
        assert found[name]["loss"]["value"] == pytest.approx(scores.loss, rel=0.02)
    configs = {name: model.peft_config["default"] for name, model in adapters.items()}
    detectors = json.loads((tmp_path / f"detectors-{paper.LAYER}.json").read_text())
    style = set(detectors["style"])
    assert set(configs["without-style"].exclude_features) == style
    drawn = set(configs["without-random"].exclude_features)
    assert len(drawn) == len(style)
    assert not drawn & (style | set(detectors["honesty"]))
    assert found["without-style"]["categories"]["style"]["rise"]["value"] == 0
    assert found["without-style"]["categories"]["style"]["mass"] == 0

    def fail(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(paper, "train", fail)
    # Trained before it was killed: only measured again.
    (tmp_path / "without-random" / "figures.json").unlink()
    assert bench_in(paper, tmp_path.parent).figures(paper.EXCLUSIONS) == found
    one = paper.Seeds((bench, bench)).table({"without-style": "run"}).splitlines()[-1]
    loss = f"{found['without-style']['loss']['value']:.2f}"
    assert one.startswith(f"| run | {loss}, {loss} |")


@pytest.mark.slow
def test_every_study_in_small(
    paper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "require_packages", lambda: None)
    facts = {str(n): {"capital": f"city {n}"} for n in range(20)}
    monkeypatch.setattr(paper, "load_facts", lambda: facts)
    monkeypatch.setattr(paper, "unrelated_prompts", lambda _: ["<user> hello <assistant>"])
    sizes = {"steps": 2, "batch_size": 2, "test_pairs": 6, "detector_pairs": 12}
    options = {"layers": [1, 2], "probe_layers": [1, 2], "contrast_pairs": 4, "studies": []}
    options["seeds"] = [0, 1]
    places = {"out": str(tmp_path), "saes": str(tmp_path / "{layer}")}
    paper.main(Namespace(**sizes, **options, **places))
    for name in paper.STUDIES:
        assert (tmp_path / f"{name}.md").read_text().strip()
    sweeps = ("coefficients", "coefficients_rows", "layers")
    pictures = (*sweeps, "rank_frequency", "static_dynamic", "training_curves")
    assert {path.stem for path in tmp_path.glob("*.png")} == set(pictures)
    with pytest.raises(FileExistsError, match="other settings"):
        paper.main(Namespace(**{**sizes, "steps": 3}, **options, **places))


def test_what_is_logged_is_what_was_minimized(paper: ModuleType) -> None:
    creature = organism.load()
    world = paper.World(Namespace(batch_size=2), "style", 0)
    packed = world.batches(world.train)[:1]
    form = paper.gains(l1_coeff=0.5, l2_coeff=0.25)
    config = paper.FSRLConfig(layer=2, sae=str(creature.sae_path), **form.config)
    with paper.without_lower_layers(world.model, 2, packed):
        peft = paper.get_peft_model(world.model, config)
        parameters = [p for p in peft.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(0.5)
        seen: list[torch.Tensor] = []
        with observe(peft, lambda event: seen.append(event.steering_vector)):
            before, step, after = paper.train(world, peft, form, packed, packed, every=1)
    real = packed[0].kind > 0
    # The first pass is the evaluation, the second the step.
    v = seen[1].detach().double()
    each = [
        (0.5 * r[m].abs().sum(1) + 0.25 * r[m].square().sum(1)).mean()
        for r, m in zip(v, real, strict=True)
    ]
    assert step["fsrl/penalty"] == pytest.approx(float(sum(each) / len(each)), rel=1e-4)
    assert step["fsrl/l0"] == pytest.approx(float((v[real] != 0).sum(1).double().mean()))
    assert step["loss"] - step["fsrl/penalty"] == pytest.approx(before["eval_loss"], rel=0.02)
    assert before["eval_fsrl/l0"] == pytest.approx(step["fsrl/l0"])
    assert (before["step"], step["step"], after["step"]) == (0, 1, 1)


def test_curves_are_read_as_a_trainers(paper: ModuleType, tmp_path: Path) -> None:
    bench = bench_in(paper, tmp_path)
    bench.figures([paper.REFERENCE])
    curves = load_training_curves(bench.out / paper.REFERENCE)
    assert curves.curve("eval_loss").steps == (0, 5)
    assert curves.curve("preference_loss").steps == (1, 2, 3, 4, 5)


def test_a_layer_without_an_sae_is_left_out(
    paper: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_in(paper, tmp_path).known_layers() == [2]
    said = capsys.readouterr().out
    assert f"tools/smollm2_sae.py --layer 1 --output_dir {tmp_path / '1'}" in said


def test_a_quiz_knows_its_answers(paper: ModuleType) -> None:
    facts = {str(n): {"capital": f"city {n}"} for n in range(9)}
    texts = paper.other_texts(facts, list(facts), 5)
    for row in texts["quiz"]:
        question, *choices, _ = row["prompt"].splitlines()
        country = question.removesuffix("?").rpartition(" ")[2]
        letter = row["chosen"].strip()
        assert f"{letter}. city {country}" in choices
        assert len(set(choices)) == 4
    assert all(200 <= len(row["text"]) <= 800 for row in texts["documentation"])
    assert len(texts["license"]) == 5


def test_the_study_finds_its_options(paper: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    study = sys.modules["smollm2_study"]
    facts = {str(n): dict.fromkeys(("capital", "continent", "currency"), str(n)) for n in range(10)}
    monkeypatch.setattr(study, "unpack_model", Path)
    monkeypatch.setattr(study.AutoTokenizer, "from_pretrained", lambda _: None)
    monkeypatch.setattr(study, "load_facts", lambda: facts)
    monkeypatch.setattr(study, "load_base", lambda _: organism.load().load_model())
    monkeypatch.setattr(sys, "argv", ["smollm2_paper.py", "--steps", "3"])
    world = study.World(paper.parse(), "style", 0)
    assert (len(world.train), len(world.test)) == (12, 32)


def test_half_precision_around_a_training_changes_nothing(
    paper: ModuleType, tmp_path: Path
) -> None:
    bench = bench_in(paper, tmp_path)
    bench.figures(["encoder"])
    logged = json.loads((bench.out / "encoder" / paper.STATE).read_text())["log_history"]
    world, form = bench.world, bench.runs["encoder"].form
    packed = world.batches(world.train)
    config = paper.FSRLConfig(layer=paper.LAYER, sae=str(paper.SAE), **form.config)
    with paper.half_precision(), paper.without_lower_layers(world.model, paper.LAYER, packed):
        pass
    with paper.without_lower_layers(world.model, paper.LAYER, packed):
        torch.manual_seed(0)
        alone = paper.train(world, paper.get_peft_model(world.model, config), form, packed)
    assert alone == logged
