"""Sweep and search with a stand-in for the training: what runs, is kept, and is drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peft_fsrl.analysis import SweepPoint, load_sweep, save_sweep
from peft_fsrl.analysis.plots import plot_sweep
from peft_fsrl.training.checkpoints import mark_complete

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Takes simpo.py's place: writes figures that follow from its options, and a line about each call.
STAND_IN = """
import json, math, os, signal, sys
from pathlib import Path
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
here = Path(__file__).parent
with (here / "calls.txt").open("a") as file:
    file.write(json.dumps(flags) + "\\n")
if (here / "kill").exists():
    (here / "kill").unlink()
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(1)
if (here / "fail").exists() and flags["layer"] == "1":
    sys.exit("no luck")
coefficient = float(flags["l1_coeff"]) or float(flags["l0_coeff"])
out = Path(flags["output_dir"])
out.mkdir(parents=True, exist_ok=True)
loss = 1 + coefficient + int(flags["layer"]) + float(flags.get("learning_rate", 0))
figures = {"eval_loss": loss, "eval_fsrl/l0": 1 / coefficient, "eval_rewards/accuracies": 0.5}
(out / "eval_results.json").write_text(json.dumps(figures))
"""


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import sweep

    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "SCRIPT", tmp_path / "stand_in.py")
    return sweep


def calls(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "calls.txt").read_text().splitlines()]


def arguments(folder: Path, *others: str) -> list[str]:
    common = ["--sae", "sae-{layer}", "--layer", "2", "--layers", "1", "2"]
    coefficients = ["--l1_coeffs", "0.1", "0.5", "--l1_coeff", "0.5"]
    return ["sweep", "--out", str(folder / "out"), *common, *coefficients, *others]


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", argv)
    return module.main()


def test_two_stages_each_run_once(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(tmp_path, "--seeds", "0", "3", "--max_steps=7")
    assert run(sweep, monkeypatch, argv) == 0
    made = calls(tmp_path)
    # The run that both stages share is made once for each seed.
    assert [(c["layer"], c["l1_coeff"], c["seed"]) for c in made] == [
        (layer, coefficient, seed)
        for layer, coefficient in (("2", "0.1"), ("2", "0.5"), ("1", "0.5"))
        for seed in ("0", "3")
    ]
    assert all(call["max_steps"] == "7" for call in made)
    assert all(call["sae"] == f"sae-{call['layer']}" for call in made)
    points = load_sweep(tmp_path / "out" / "sweep.csv")
    assert [(p.stage, p.layer, p.l1_coeff, p.seed, p.loss, p.l0) for p in points] == [
        (stage, layer, coefficient, seed, 1 + coefficient + layer, 1 / coefficient)
        for stage, layer, coefficient in (
            ("coefficients", 2, 0.1),
            ("coefficients", 2, 0.5),
            ("layers", 1, 0.5),
            ("layers", 2, 0.5),
        )
        for seed in (0, 3)
    ]
    for point, flag in ((points[0], "--l1_coeff=0.1"), (points[4], "--layer=1")):
        assert flag in point.command
        assert f"--output_dir={tmp_path / 'out' / point.name}" in point.command
    assert all(point.perplexity is None and point.seconds > 0 for point in points)
    assert {"coefficients.png", "layers.png"} <= set(os.listdir(tmp_path / "out"))

    assert run(sweep, monkeypatch, argv) == 0
    assert calls(tmp_path) == made
    assert load_sweep(tmp_path / "out" / "sweep.csv") == points
    # Other options are other runs.
    assert run(sweep, monkeypatch, [*argv[:-1], "--max_steps=8"]) == 0
    assert len(calls(tmp_path)) == 2 * len(made)


def test_a_failed_run_is_told_and_tried_again(
    sweep: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "fail").touch()
    assert run(sweep, monkeypatch, arguments(tmp_path)) == 1
    [failed] = [p for p in load_sweep(tmp_path / "out" / "sweep.csv") if not p.finished]
    assert failed.layer == 1
    assert f"{failed.name}: FAILED" in capsys.readouterr().out
    assert "no luck" in (tmp_path / "out" / "logs" / f"{failed.name}.txt").read_text()
    (tmp_path / "fail").unlink()
    before = len(calls(tmp_path))
    assert run(sweep, monkeypatch, arguments(tmp_path)) == 0
    assert len(calls(tmp_path)) == before + 1


@pytest.mark.slow
def test_a_killed_sweep_goes_on(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ["--l1_coeffs", "0.1", "--layers", "2", "--l1_coeff", "0.1"]
    assert run(sweep, monkeypatch, [*arguments(tmp_path), *one]) == 0
    first = calls(tmp_path)
    assert len(first) == 1
    (tmp_path / "kill").touch()
    code = f"import sys, sweep; sweep.SCRIPT = {str(sweep.SCRIPT)!r}; sys.exit(sweep.main())"
    paths = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])
    argv = arguments(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, *argv[1:]], env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == -9
    assert len(calls(tmp_path)) == len(first) + 1
    # What the killed run left: a checkpoint, and a table with the runs before it.
    killed = Path(calls(tmp_path)[-1]["output_dir"])
    (killed / "checkpoint-9").mkdir(parents=True)
    mark_complete(killed / "checkpoint-9")
    (killed / "checkpoint-10").mkdir()
    (killed / "eval_results.json").write_text('{"eval_loss"')
    assert run(sweep, monkeypatch, argv) == 0
    resumed = calls(tmp_path)[len(first) + 1]
    assert resumed["output_dir"] == str(killed)
    assert resumed["resume_from_checkpoint"] == "true"
    assert all(point.finished for point in load_sweep(tmp_path / "out" / "sweep.csv"))


@pytest.mark.slow
def test_a_run_whose_sweep_was_killed_is_waited_for(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*arguments(tmp_path), "--l1_coeffs", "0.1", "--layers", "2", "--l1_coeff", "0.1"]
    ended, patient = tmp_path / "ended", tmp_path / "patient.py"
    patient.write_text(
        "import os, signal, time\n"
        "os.kill(os.getppid(), signal.SIGKILL)\n"
        "time.sleep(2)\n"
        f"open({str(ended)!r}, 'w')\n" + sweep.SCRIPT.read_text()
    )
    code = f"import sys, sweep; sweep.SCRIPT = {str(patient)!r}; sys.exit(sweep.main())"
    paths = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])
    command = [sys.executable, "-c", code, *argv[1:]]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == -9
    assert not ended.exists(), "the run outlives its sweep"
    assert run(sweep, monkeypatch, argv) == 0
    assert len(calls(tmp_path)) == 1, "and is not made a second time beside it"
    assert ended.exists()


def test_the_organism_has_an_sae_of_every_layer(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_fsrl import organism

    trained = []

    def train(model: Any, world: Any, settings: Any, seed: int, path: Path, name: str) -> None:
        trained.append((settings.layer, settings.samples, settings.d_sae, name))
        path.mkdir(parents=True)

    monkeypatch.setattr("dictionary.train_dictionary", train)
    assert sweep.organism_sae(2, tmp_path) == organism.load().sae_path
    assert trained == []
    for _ in range(2):
        assert sweep.organism_sae(1, tmp_path) == tmp_path / "saes" / "layer_1"
    assert trained == [(1, 2_000_000, 384, "peft_fsrl/organism-default")]


def test_other_models_need_their_layers_named(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["--sae", "one"], ["--sae", "sae-{layer}", "--layer", "3"]):
        with pytest.raises(SystemExit):
            run(sweep, monkeypatch, ["sweep", *argv])
        assert "which must contain {layer}, give --layer and --layers" in capsys.readouterr().err


POINT = SweepPoint(
    stage="layers",
    name='a, "b"',
    layer=3,
    seed=1,
    l1_coeff=0.1,
    l0_coeff=0.0,
    loss=1 / 3,
    accuracy=0.5,
    l0=2.0,
    l1=None,
    perplexity=float("inf"),
    perplexity_unsteered=None,
    repetition=0.0,
    distinct_2=None,
    seconds=12.5,
    command="python 'x y' --l1_coeff=0.1",
)


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    points = (POINT, replace(POINT, loss=None, seed=2))
    save_sweep(tmp_path / "new" / "sweep.csv", points)
    assert load_sweep(tmp_path / "new" / "sweep.csv") == points
    assert os.listdir(tmp_path / "new") == ["sweep.csv"]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"Expected the columns .*found \['a', 'b'\]"):
        load_sweep(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stage,", "stage,mine,", r"Expected the columns .*'mine'.*Move the file away"),
        ("a run", "a run,b", r"Expected \d+ cells in line 2 of .*Mend or remove"),
        (",a run", "", r"Expected \d+ cells in line 2 of"),
        ("0.25", "many", r"In line 2 of .*'many'"),
    ],
)
def test_a_damaged_table_says_where(old: str, new: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "sweep.csv"
    save_sweep(table, [replace(POINT, l1_coeff=0.25, command="a run")])
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_sweep(table)


def test_pictures_show_every_run() -> None:
    points = [
        replace(POINT, l1_coeff=coefficient, seed=seed, loss=coefficient + seed, l0=1 / coefficient)
        for coefficient in (0.1, 0.5)
        for seed in (0, 1)
    ]
    figure = plot_sweep([*points, replace(POINT, l1_coeff=0.9, loss=None)], "l1_coeff")
    above, below = figure.axes
    assert above.get_xscale() == "log"
    lines = [line.get_xydata().tolist() for line in above.get_lines()]
    assert lines == [
        [[0.1, pytest.approx(0.6)], [0.5, 1.0]],
        [[0.1, 0.1], [0.1, 1.1]],
        [[0.5, 0.5], [0.5, 1.5]],
    ]
    assert below.get_lines()[0].get_xydata().tolist() == [[0.1, 10.0], [0.5, 2.0]]
    for panel in (above, below):
        highest = max(line.get_ydata().max() for line in panel.get_lines())
        assert panel.get_ylim()[0] == 0
        assert panel.get_ylim()[1] > highest
    assert plot_sweep(points, "layer").axes[0].get_xscale() == "linear"
    with pytest.raises(ValueError, match="at least one finished run"):
        plot_sweep([replace(POINT, loss=None)], "layer")


@pytest.fixture
def search(sweep: ModuleType) -> ModuleType:
    pytest.importorskip("optuna")
    import search

    return search


def searched(folder: Path, trials: int) -> list[str]:
    options = ["--sae", "one", "--layer", "2", "--trials", str(trials), "--confirm_seeds", "5", "6"]
    return ["search", "--out", str(folder), *options, "--target_l0", "200"]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_search_goes_on_as_if_it_had_not_been_stopped(
    search: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> list[dict[str, str]]:
        made = calls(tmp_path)
        (tmp_path / "calls.txt").unlink()
        return [{k: v for k, v in call.items() if k != "output_dir"} for call in made]

    assert run(search, monkeypatch, searched(tmp_path / "whole", 5)) == 0
    whole = asked()
    assert len(whole) == 2 * 5 + 2 * 2
    only = ["--families", "jumprelu"]
    assert run(search, monkeypatch, [*searched(tmp_path / "parts", 3), *only]) == 0
    (tmp_path / "calls.txt").unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search.Table, "_train", stop)
        with pytest.raises(KeyboardInterrupt):
            run(search, patch, [*searched(tmp_path / "parts", 5), *only])
    assert run(search, monkeypatch, [*searched(tmp_path / "parts", 5), *only]) == 0
    tried = [call for call in whole if call["activation"] == "jumprelu" and call["seed"] == "0"]
    rest = [call for call in asked() if call["seed"] == "0"]
    assert len(rest) == 2
    assert rest == tried[3:]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_search_confirms_the_best_within_the_target(
    search: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(search, monkeypatch, searched(tmp_path / "out", 4)) == 0
    points = load_sweep(tmp_path / "out" / "sweep.csv")
    for family in ("soft_threshold", "jumprelu"):
        tried = [point for point in points if point.stage == f"search {family}"]
        assert len(tried) == 4
        best = min((point for point in tried if point.l0 <= 200), key=lambda point: point.loss)
        confirmed = [point for point in points if point.stage == f"confirm {family}"]
        assert [point.seed for point in confirmed] == [5, 6]
        assert {(p.l1_coeff, p.l0_coeff) for p in confirmed} == {(best.l1_coeff, best.l0_coeff)}
    made = calls(tmp_path)
    for call in made:
        if call["activation"] == "jumprelu":
            # Gates that are closed at the start never open.
            assert call["init_scale"] == call["init_threshold"]
            assert float(call["l1_coeff"]) == 0
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "| l0 at most | soft_threshold | jumprelu |" in tables
    assert f"{best.loss:.3f}" in tables
