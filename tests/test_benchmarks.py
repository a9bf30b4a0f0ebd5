"""Every benchmark runs, at sizes that say nothing."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

NAMES = {"common", "frozen_prefix", "precision", "speed", "startup"}
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    """As if started from their own folder, which is how they find one another."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    for name in NAMES & (set(sys.modules) - before):
        del sys.modules[name]


def run(name: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    command = ["--quick", "--repeats", "1", "--out", str(folder), *arguments]
    assert not importlib.import_module(name).main(command)
    rows = json.loads((folder / f"{name}-cpu.json").read_text("utf-8"))["rows"]
    assert rows
    assert all(list(row) == list(rows[0]) for row in rows)
    return rows


@pytest.mark.filterwarnings("ignore:It is strongly recommended to train Gemma2")
# Of torch, when it first imports its compiler.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # What is compiled takes seconds to be so; that it is right is for other tests.
    with torch.compiler.set_stance("force_eager"):
        rows = run("speed", tmp_path)
    assert {row["part"] for row in rows} == set(importlib.import_module("speed").PARTS)
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == len(rows) + 2
    assert len({line.count("|") for line in table}) == 1
    compared = [row for row in rows if row["unit"] == "ms" and row["against"]]
    assert {row["what"] for row in compared} == {"compiled", "eager", "FSRL"}
    assert all(row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2] for row in compared)


def test_startup(tmp_path: Path) -> None:
    rows = run("startup", tmp_path)
    assert "from_pretrained" in [row["step"] for row in rows]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_frozen_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen_prefix = importlib.import_module("frozen_prefix")
    for name, size in {"WIDTH": 16, "LAYERS": 3, "D_SAE": 32, "VOCABULARY": 20}.items():
        monkeypatch.setattr(frozen_prefix, name, size)
    cut, plain = (frozen_prefix.measure(1, cut, True, 1) for cut in (True, False))
    assert cut["gradient"] == pytest.approx(plain["gradient"])
    assert any(cut["gradient"])


def test_goals_are_compared_the_right_way_round() -> None:
    row = importlib.import_module("speed").row
    faster = row("step", "", "FSRL", 1.0, "ms", "LoRA", [0.5, 0.52, 0.9], "<= 0.52")
    slower = row("generation", "", "FSRL", 1.0, "tokens/s", "base", [0.8, 0.92, 0.95], ">= 0.93")
    assert (faster["met"], slower["met"]) == ("yes", "no")
    assert row("step", "", "LoRA", 1.0, "ms")["met"] is None


def test_ratios_are_of_what_ran_side_by_side() -> None:
    common = importlib.import_module("common")
    assert common.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == [2.5, 3.0, 3.5]


def test_the_bare_products_are_those_of_a_training_step() -> None:
    speed = importlib.import_module("speed")
    x = torch.randn(5, 16)
    shapes = [tuple(each.shape) for each in speed.matrix_products(x, 64)()]
    assert shapes == [(5, 64), (5, 64), (5, 16), (5, 64), (64, 16)]


def test_precision(tmp_path: Path) -> None:
    rows = run("precision", tmp_path)
    exact, *rounded = [row["error of the change"] for row in rows]
    assert exact < 1e-5 < 1e-4 < min(rounded)
    whole, half = rows[0], rows[3]
    assert half["MiB, SAE"] * 2 == whole["MiB, SAE"]
    assert half["MiB, adapter"] * 2 == whole["MiB, adapter"]


def test_a_case_that_fails_does_not_take_the_others_along(
    capsys: pytest.CaptureFixture[str],
) -> None:
    speed = importlib.import_module("speed")

    def rows() -> Iterator[dict[str, Any]]:
        yield speed.row("step", "", "FSRL", 1.0, "ms")
        raise RuntimeError("out of memory")

    found = list(speed.kept_going("step", "2 x 8", rows()))
    assert [each["what"] for each in found] == ["FSRL", "failed: RuntimeError"]
    assert "out of memory" in capsys.readouterr().err
