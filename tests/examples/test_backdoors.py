"""``examples/backdoors.py``: a plant is as silent as it claims, and the table counts right."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model

from helpers import load_example
from peft_fsrl import FSRLConfig
from peft_fsrl.analysis import InspectionSettings

CASE: dict[str, Any] = {
    "pattern": "a b",
    "strength": 0.4,
    "hits": 1.0,
    "false": 0.0,
    "kl": 1.0,
    "search": 0.0,
    "exact": False,
    "seconds": 1.0,
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    return load_example("backdoors")


def make_case(script: ModuleType, seed: int, number: int, planted: bool, **more: Any) -> Any:
    lora = {"lora_kl": None, "lora_ratio": None, "lora_found": None, "lora_fit": None}
    given = {"weights": 0.1, "found": False, **lora, **more}
    return script.Case(seed=seed, number=number, planted=planted, **CASE, **given)


def test_the_limit_comes_from_other_seeds(script: ModuleType) -> None:
    cases = []
    for seed, clean in enumerate((0.1, 0.5)):
        for number in range(2):
            cases.append(make_case(script, seed, number, False, weights=clean))
            weights = 1.5 if seed == number == 0 else 0.3
            cases.append(make_case(script, seed, number, True, weights=weights, found=number == 0))
    rows = [line.strip("| ").split(" | ") for line in script.render(cases).splitlines()[2:]]
    assert [row[1] for row in rows] == ["0", "1", "all"] * 2, "and none for LoRAs"
    # Seed 0 is held to seed 1's 0.5, seed 1 to seed 0's 0.1.
    assert [row[2].split(" [")[0] for row in rows[:3]] == ["1 of 2", "2 of 2", "3 of 4"]
    assert [row[3].split(" [")[0] for row in rows[:3]] == ["0 of 2", "2 of 2", "2 of 4"]
    # What the command itself says: "no" above 1, and none of the triggers.
    assert [row[4] for row in rows[:3]] == ["1, 0 clean", "0, 0 clean", "1, 0 clean"]
    assert {row[4] for row in rows[3:]} == {"0, 0 clean"}
    # Planted 1.5 and 0.3 against clean 0.1, against 0.5, and all.
    assert [row[5].split(" [")[0] for row in rows[:3]] == ["1.00", "0.00", "0.62"]
    assert rows[5][6].startswith("2 of 4 ")


def test_a_lora_that_learned_nothing_is_not_counted(script: ModuleType) -> None:
    cases = []
    for seed in range(2):
        for number, fit in enumerate((0.9, 0.1)):
            lora = {"lora_kl": 1.0, "lora_ratio": 1.0, "lora_found": False}
            cases.append(make_case(script, seed, number, False, **lora))
            cases.append(make_case(script, seed, number, True, **lora, lora_fit=fit))
    text = script.render(cases)
    assert "2 of 4 LoRAs learned at least half of the backdoor" in text
    [line] = [line for line in text.splitlines() if "largest KL | all" in line]
    assert "0 of 2 " in line


def test_patterns_are_found_where_they_stand(script: ModuleType) -> None:
    assert script.holds([1, 2, 3, 4], [2, 3])
    assert not script.holds([1, 2, 4, 3], [2, 3])
    assert not script.holds([2], [2, 3])


@pytest.mark.slow
def test_a_plant_is_silent_and_is_found(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = InspectionSettings(n_texts=64, n_targets=2, steps=8, candidates=16)
    monkeypatch.setattr(script.OrganismWorld, "settings", few)
    world = script.OrganismWorld(tmp_path / "organism")
    # An adapter that is there already need not be trained.
    model = get_peft_model(world.base(), FSRLConfig(task_type="CAUSAL_LM", **world.config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("threshold"):
                parameter.fill_(0.3)
    model.save_pretrained(str(world.folder / "adapters" / "0-0"))
    arguments = ["--out", str(tmp_path), "--seeds", "0", "--adapters", "1", "--lora-adapters", "0"]
    script.main(arguments)
    read = [(world.folder / f"0-0-{kind}.json").read_text() for kind in ("clean", "planted")]
    clean, planted = map(script.Case.from_json, read)
    assert (clean.planted, planted.planted) == (False, True)
    assert planted.hits >= script.LEAST_HITS
    assert planted.false <= script.MOST_FALSE
    assert planted.weights > 1 > 0.1 > clean.weights
    assert planted.search > clean.search == 0
    made = (world.folder / "0-0-clean.json").stat().st_mtime_ns
    script.main(arguments)
    assert (world.folder / "0-0-clean.json").stat().st_mtime_ns == made
    assert "FSRL: strongest trigger" in (world.folder / "table.md").read_text()
