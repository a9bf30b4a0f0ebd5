"""Training curves from files, and what figures and tables show of records."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import helpers
from peft_fsrl.analysis import (
    Ablation,
    Curve,
    Interval,
    PreferenceScores,
    RankFrequency,
    Session,
    StaticDynamic,
    SteeringLevel,
    Summary,
    SweepPoint,
    TrainingCurves,
    Usage,
    by_penalty,
    load_training_curves,
    render_variants,
    score_preferences,
)
from peft_fsrl.analysis.plots import (
    plot_ablations,
    plot_losses,
    plot_rank_frequencies,
    plot_static_dynamic,
    plot_training_curves,
    plot_variants,
)
from peft_fsrl.analysis.report import render_ablations


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def write_state(folder: Path, history: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "trainer_state.json"
    file.write_text(json.dumps({"log_history": history}))
    return file


def test_curves_of_a_real_trainer(tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from peft_fsrl import with_fsrl

    rows = helpers.tiny_preferences(4)
    model = helpers.fsrl_model(l1_coeff=2.0)
    before = score_preferences(Session(model, helpers.tiny_tokenizer(), rows.to_list()))
    args = CPOConfig(
        str(tmp_path),
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=10.0,
        simpo_gamma=5.0,
        max_length=32,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        # Nothing moves, so that what is logged can be measured beforehand.
        learning_rate=0.0,
        remove_unused_columns=False,
        save_strategy="no",
    )
    trainer = with_fsrl(CPOTrainer)(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=Dataset.from_list(rows.to_list()),
        processing_class=helpers.tiny_tokenizer(),
    )
    trainer.train()
    trainer.save_state()
    curves = load_training_curves(tmp_path)
    assert TrainingCurves.from_json(curves.to_json()) == curves
    preference = curves.curve("preference_loss")
    assert preference.steps == (1, 2)
    assert preference.values == pytest.approx([before.loss] * 2, rel=1e-4)
    penalty = curves.curve("fsrl/penalty").values
    assert min(penalty) > 0.1
    totals = [a + b for a, b in zip(preference.values, penalty, strict=True)]
    assert curves.curve("loss").values == pytest.approx(totals)
    assert curves.curve("eval_loss").steps == (2,)
    assert curves.curve("eval_loss").values == pytest.approx([before.loss], rel=1e-4)
    assert {"eval_rewards/margins", "fsrl/l0", "eval_fsrl/l0"} <= {c.name for c in curves.curves}
    # A mean over the run is no point of a curve.
    assert not {"train_loss", "epoch", "step"} & {curve.name for curve in curves.curves}
    panels = plot_training_curves(curves).axes
    assert [len(panel.lines) for panel in panels] == [2, 2, 2]
    assert list(panels[0].lines[0].get_ydata()) == list(preference.values)
    assert list(panels[0].lines[1].get_ydata()) == list(curves.curve("eval_loss").values)


def test_curves_of_a_run_or_its_last_checkpoint(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "fsrl/penalty": 0.5}]
    write_state(tmp_path / "checkpoint-9", history[:1])
    write_state(tmp_path / "checkpoint-10", history)
    expected = Curve("preference_loss", (1, 2), (3.0, 1.5))
    assert load_training_curves(tmp_path).curve("preference_loss") == expected
    file = write_state(tmp_path, [*history, {"step": 3, "loss": 1.0}])
    assert load_training_curves(tmp_path).curve("loss").values == (3.0, 2.0, 1.0)
    assert load_training_curves(file) == load_training_curves(str(tmp_path))


def test_what_is_not_finite_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": math.nan, "kind": "x", "flag": True}]
    with caplog.at_level(logging.WARNING):
        curves = load_training_curves(write_state(tmp_path, history))
    assert curves.curve("loss") == Curve("loss", (1,), (3.0,))
    assert {curve.name for curve in curves.curves} == {"loss", "preference_loss"}
    assert "Left out 2 logged values" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"log_history": [{"step": 1, "lo', "is not JSON.*cut off"),
        ("", "is not JSON"),
        ("[1, 2]", "state of a transformers trainer"),
        ('{"losses": []}', "state of a transformers trainer"),
        ('{"log_history": [{"loss": 1.0}]}', "rows have a `step`"),
        ('{"log_history": []}', "Expected logged values"),
        ('{"log_history": [{"step": 3, "train_loss": 2.0, "epoch": 1.0}]}', "logging_steps"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_training_curves(tmp_path)


def test_a_run_that_left_no_state(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="save_state"):
            load_training_curves(path)


def test_a_figure_shows_the_curves_that_there_are() -> None:
    curves = TrainingCurves((Curve("eval_loss", (5,), (2.0,)), Curve("other", (1,), (1.0,))))
    [panel] = plot_training_curves(curves).axes
    assert panel.get_ylabel() == "preference loss"
    assert len(panel.lines) == 1
    with pytest.raises(ValueError, match=r"Expected one of the curves.*found \['other'\]"):
        plot_training_curves(TrainingCurves(curves.curves[1:]))


def test_rank_and_frequency_are_drawn_with_their_fit() -> None:
    record = RankFrequency("prompt_chosen", (1, 2, 3), (0.5, 0.2, 0.1), 3, 0.9, 0.8, 0.97)
    panel = plot_rank_frequencies([record]).axes[0]
    points, fit = panel.lines
    assert list(points.get_ydata()) == [0.5, 0.2, 0.1]
    assert list(fit.get_ydata()) == pytest.approx([0.9 * math.exp(-0.8 * r) for r in (1, 2, 3)])
    assert panel.get_yscale() == "log"
    assert "prompt + chosen (3 features)" in panel.get_legend().get_texts()[0].get_text()
    for wrong in ([], [record] * 5):
        with pytest.raises(ValueError, match="1 to 4 records"):
            plot_rank_frequencies(wrong)


def level(share: float, loss: float) -> SteeringLevel:
    def around(value: float) -> Interval:
        return Interval(value, value - 0.1, value + 0.1)

    return SteeringLevel(share, 1, share * 100, around(loss), around(0.8), around(1.0))


def test_static_against_dynamic_is_drawn() -> None:
    record = StaticDynamic(
        100,
        5.0,
        level(0.03, 1.5),
        (level(0.01, 3.0), level(0.04, 1.6)),
        (level(0.01, 4.0), level(0.04, 2.0)),
    )
    losses, accuracies = plot_static_dynamic(record).axes
    dynamic, static, learned, star, base = losses.lines
    assert list(dynamic.get_ydata()) == [3.0, 1.6]
    assert list(static.get_ydata()) == [4.0, 2.0]
    assert set(learned.get_ydata()) == {1.5}
    # At its own features per token, as a share of all.
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (pytest.approx(0.03), 1.5)
    assert set(base.get_ydata()) == {5.0}
    assert accuracies.get_xscale() == "log"
    with pytest.raises(ValueError, match="at least one level"):
        plot_static_dynamic(StaticDynamic(100, 5.0, level(0.03, 1.5), (), ()))


def run(l0: float | None, loss: float | None, l0_coeff: float = 0.0) -> SweepPoint:
    figures = [0.5, l0, 1.0, None, None, None, None, 1.0]
    return SweepPoint("s", "n", 2, 0, 0.1, l0_coeff, loss, *figures, "c")


def test_variants_are_compared_at_equal_sparsity() -> None:
    runs = [run(4.0, 1.4), run(1.0, 2.0), run(2.0, 2.5), run(None, None)]
    jumps = [run(0.5, 1.8, 0.2), run(9.0, 1.2, 0.1)]
    variants = by_penalty([*runs, *jumps])
    assert variants == {"L1 penalty": tuple(runs), "L0 penalty": tuple(jumps)}
    assert by_penalty(runs) == {"L1 penalty": tuple(runs)}
    table = [line.split() for line in render_variants(variants, (0.1, 1, 4, 16)).splitlines()]
    assert table[1:] == [
        ["0.1", "-", "-"],
        ["1", "2.000", "(l0", "1.00)", "1.800", "(l0", "0.50)"],
        ["4", "1.400", "(l0", "4.00)", "1.800", "(l0", "0.50)"],
        ["16", "1.400", "(l0", "4.00)", "1.200", "(l0", "9.00)"],
    ]
    panel = plot_variants(variants).axes[0]
    dots, lowest = panel.lines[:2]
    assert list(dots.get_xdata()) == [1.0, 2.0, 4.0]
    assert list(dots.get_ydata()) == [2.0, 2.5, 1.4]
    assert list(lowest.get_xdata()) == [1.0, 2.0, 4.0, 9.0]
    assert list(lowest.get_ydata()) == [2.0, 2.0, 1.4, 1.4]
    with pytest.raises(ValueError, match="got 0"):
        plot_variants({"L1 penalty": [run(None, None)]})


def scores(loss: float) -> PreferenceScores:
    return PreferenceScores((loss, loss), (1.0, -1.0), (3, 3), (3, 3))


def ablation(name: str, rise: float, reached: float) -> Ablation:
    interval = Interval(rise, rise - 0.2, rise + 0.2)
    return Ablation(
        name,
        (1, 2),
        0.8,
        scores(1.0 + rise),
        (scores(1.25), scores(1.35)),
        (scores(1.5),),
        (reached,),
        interval,
        interval,
        interval,
        None,
        None,
        (),
    )


def test_ablations_are_shown_with_their_intervals() -> None:
    found = (ablation("formatting/style", 3.0, 0.2), ablation("honesty", 0.5, 0.79))
    text = render_ablations(scores(5.0), scores(1.0), found)
    assert max(map(len, text.splitlines())) < 100
    nothing, style, honesty = text.splitlines()[1:]
    assert nothing.split() == ["nothing", "1.000", "50.0%"]
    # A control that does not reach the category's mass says what share of it it reaches.
    figures = ["+3.000", "+2.80", "to", "+3.20", "75%", "+0.300", "+0.500", "(25%)"]
    assert style.split()[-8:] == figures
    assert honesty.split()[-7:] == ["+0.500", "+0.30", "to", "+0.70", "12%", "+0.300", "+0.500"]

    summary = Summary(scores(5.0), scores(1.0), Usage("chosen", 1, 1.0, 1.0, ()), found, ())
    panel = plot_ablations({"one": [summary]}).axes[0]
    assert [bar.get_height() for bar in panel.patches] == pytest.approx([3.0, 0.3, 0.5, 0.3])
    [line] = panel.collections[0].get_segments()
    assert [end[1] for end in line] == pytest.approx([2.8, 3.2])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_rank_frequencies([RankFrequency("prompt", (1,), (0.5,), 1, 1.0, 1.0, 1.0)]),
        lambda: plot_variants({"a": [run(1.0, 1.0)]}),
    ],
)
def test_a_missing_matplotlib_is_named(
    monkeypatch: pytest.MonkeyPatch, draw: Callable[[], Any]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "peft-fsrl\[plots\]"'):
        draw()


def test_losses_of_several_methods_are_means_over_their_runs() -> None:
    def run(*values: float) -> TrainingCurves:
        return TrainingCurves((Curve("eval_loss", (10, 20), values), Curve("loss", (5,), (9.0,))))

    figure = plot_losses({"FSRL": [run(3.0, 1.0), run(5.0, 2.0)], "LoRA": [run(4.0, 4.0)]})
    [panel] = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
    assert lines["FSRL"] == [4.0, 1.5]
    assert lines["LoRA"] == [4.0, 4.0]
    assert len(panel.lines) == 4
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["FSRL", "LoRA"]
    with pytest.raises(KeyError, match="eval_loss"):
        plot_losses({"none": [TrainingCurves((Curve("loss", (5,), (9.0,)),))]})
