"""``peft-fsrl eval`` on small local tasks, against figures worked out token by token."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import helpers
from judge_server import Reply, serve
from peft_fsrl.analysis import AnswerPair, Session, score_preferences
from peft_fsrl.analysis.content import digest_adapter, digest_base
from peft_fsrl.analysis.evaluation import Evaluation, TaskScores
from peft_fsrl.analysis.harness import Harness, TaskFigure, read_figures
from peft_fsrl.analysis.labels import JudgeError
from peft_fsrl.analysis.report import render_tasks
from peft_fsrl.cli import eval as command
from peft_fsrl.cli.main import main, make_parser
from peft_fsrl.steering import scale_steering
from peft_fsrl.training.data import pair_texts

ROOT = Path(__file__).resolve().parents[2]
N = 40
NEW_TOKENS = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["w39"], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """
group: tiny_group
task: [tiny_choice, tiny_generation]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""

# As docs/evaluation.md has it.
PROGRAM = "import peft_fsrl; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"

Logits = Callable[[list[int]], torch.Tensor]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def decided() -> Any:
    model = helpers.tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
        # Never the end, nor the word that ends a generation.
        model.get_output_embeddings().weight[[2, 39]] = 0
    return model


def numbers(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def plain_logits() -> Logits:
    """The next token's logits of the base model, without any cache."""
    model = decided()
    return lambda ids: model(torch.tensor([ids])).logits[0, -1].double()


def steered_logits(model: PeftModel) -> Logits:
    """The same for a plain model steered by the formula."""
    plain, layer, sae = decided(), helpers.only_layer(model), helpers.tiny_sae()

    def logits(ids: list[int]) -> torch.Tensor:
        with helpers.naively_steered(plain, layer, sae):
            return plain(torch.tensor([ids])).logits[0, -1].double()

    return logits


def continued(logits: Logits, ids: list[int]) -> list[int]:
    said: list[int] = []
    for _ in range(NEW_TOKENS):
        said.append(int(logits(ids + said).argmax()))
    return said


def log_probability(logits: Logits, ids: list[int], said: list[int]) -> float:
    return sum(float(logits(ids + said[:t]).log_softmax(-1)[token]) for t, token in enumerate(said))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an adapter, tasks, and preference pairs."""
    folder = tmp_path_factory.mktemp("eval")
    decided().save_pretrained(folder / "model")
    helpers.tiny_tokenizer().save_pretrained(folder / "model")
    helpers.tiny_sae().save_model(folder / "sae")
    model = helpers.fsrl_model(decided(), sae=str(folder / "sae"))
    model.peft_config["default"].base_model_name_or_path = str(folder / "model")
    model.save_pretrained(folder / "adapter")
    helpers.tiny_preferences(12).to_json(folder / "pairs.json")
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        drawn = torch.randint(3, 39, (length,), generator=generator)
        return " ".join(f"w{token}" for token in drawn.tolist())

    rows = [
        {"question": text(2 + i % 3), "choices": [text(1 + i % 2), text(2)], "answer": i % 2}
        for i in range(N)
    ]
    with torch.no_grad():
        for i, row in enumerate(rows):
            said = continued(plain_logits(), numbers(row["question"]))
            # Half of the documents ask for what the base model says.
            row["target"] = " ".join(f"w{token}" for token in said) if i % 2 else "w3 w3 w3"
    tasks = folder / "tasks"
    tasks.mkdir()
    data = tasks / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tasks / "choice.yaml").write_text(CHOICE.format(data=data))
    (tasks / "generation.yaml").write_text(GENERATION.format(data=data))
    (tasks / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def rows(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "tasks" / "data.jsonl").read_text().splitlines()]


def arguments(place: Path, output: Path, *more: str) -> argparse.Namespace:
    given = ["eval", str(place / "adapter"), "--out", str(output), *more]
    return make_parser(given).parse_args(given)


def local(place: Path, tasks: str = "tiny_choice,tiny_generation") -> list[str]:
    return ["--tasks", tasks, "--include-path", str(place / "tasks"), "--device", "cpu"]


def expected_figures(logits: Logits, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Accuracy and exact match, from the definitions."""
    right, exact = 0, 0
    with torch.no_grad():
        for row in rows:
            ids = numbers(row["question"])
            sums = [log_probability(logits, ids, numbers(choice)) for choice in row["choices"]]
            right += sums.index(max(sums)) == row["answer"]
            said = continued(logits, ids)
            assert not {2, 39} & set(said), "the test needs answers that nothing cuts"
            exact += said == numbers(row["target"])
    return right / len(rows), exact / len(rows)


def test_figures_equal_plain_counting(
    place: Path,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.run(arguments(place, tmp_path, *local(place))) == 0
    found = Evaluation.from_json((tmp_path / "eval.json").read_text())
    assert (found.adapter, found.base_model) == (str(place / "adapter"), str(place / "model"))
    model = helpers.fsrl_model(decided())
    values = {}
    for name, logits in (("base", plain_logits()), ("trained", steered_logits(model))):
        accuracy, exact = expected_figures(logits, rows)
        by_task = {each.task: each.figures for each in found.tasks if each.model == name}
        [choice], [generation] = by_task["tiny_choice"], by_task["tiny_generation"]
        assert (choice.metric, generation.metric) == ("acc", "exact_match")
        assert choice.value == accuracy
        assert generation.value == exact
        assert choice.stderr == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (N - 1)))
        assert (choice.n, choice.higher_is_better) == (N, True)
        values[name] = (accuracy, exact)
    assert values["base"][1] == 0.5
    assert values["base"][0] != values["trained"][0]
    assert values["base"][1] != values["trained"][1]
    printed = capsys.readouterr().out
    assert printed.endswith(f"Written to {tmp_path}: eval.json\n")
    for value in (*values["base"], *values["trained"]):
        assert f"{value:.4f}" in printed


def test_the_harness_loads_adapters_itself(place: Path, rows: list[dict[str, Any]]) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model="hf",
        model_args=f"pretrained={place / 'model'},peft={place / 'adapter'},device=cpu",
        tasks=["tiny_choice"],
        task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        log_samples=False,
    )
    [figure] = read_figures(results)
    accuracy, _ = expected_figures(steered_logits(helpers.fsrl_model(decided())), rows)
    assert figure.value == accuracy


def test_the_harness_own_program(
    place: Path, tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        *("run", "--model", "hf", "--device", "cpu", "--tasks", "tiny_choice"),
        *("--model_args", f"pretrained={place / 'model'},peft={place / 'adapter'}"),
        *("--include_path", str(place / "tasks"), "--output_path", str(tmp_path / "out.json")),
    ]
    monkeypatch.setattr(sys, "argv", ["-c", *options])
    exec(PROGRAM, {})
    [path] = tmp_path.rglob("out*.json")
    accuracy, _ = expected_figures(steered_logits(helpers.fsrl_model(decided())), rows)
    assert json.loads(path.read_text())["results"]["tiny_choice"]["acc,none"] == accuracy


def test_a_group_has_its_own_figure_and_those_of_its_tasks(place: Path) -> None:
    harness = Harness(["tiny_group"], place / "tasks")
    model = helpers.fsrl_model(decided()).train()
    figures = harness.run(model, helpers.tiny_tokenizer(), "tiny_group", limit=10)
    assert model.training
    found = {(each.task, each.metric): each for each in figures}
    assert {"tiny_group", "tiny_choice", "tiny_generation"} == {each.task for each in figures}
    assert found["tiny_group", "acc"].value == found["tiny_choice", "acc"].value
    assert found["tiny_choice", "acc"].n == 10


def test_a_run_that_breaks_off_is_continued(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bool]] = []

    def fake(self: Harness, model: Any, tokenizer: Any, task: str, **_: Any) -> Any:
        steers = not helpers.only_layer(model).edits
        if len(calls) == 2:
            calls.append(("break", steers))
            raise KeyboardInterrupt
        calls.append((task, steers))
        return (TaskFigure(task, "acc", 0.25 + steers, 0.125, 4, True),)

    monkeypatch.setattr(Harness, "run", fake)
    args = arguments(place, tmp_path, *local(place))
    with pytest.raises(KeyboardInterrupt):
        command.run(args)
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == [
        "tiny_choice.base.json",
        "tiny_choice.trained.json",
    ]
    command.run(args)
    assert calls[3:] == [("tiny_generation", False), ("tiny_generation", True)]
    found = Evaluation.from_json((tmp_path / "eval.json").read_text())
    assert [(each.task, each.model) for each in found.tasks] == [
        ("tiny_choice", "base"),
        ("tiny_choice", "trained"),
        ("tiny_generation", "base"),
        ("tiny_generation", "trained"),
    ]
    assert found.tasks[0].figures[0].value == 0.25
    assert found.tasks[1].figures[0].value == 1.25
    command.run(args)
    assert len(calls) == 5


def test_results_of_other_settings_are_not_mixed_in(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fake(self: Harness, model: Any, tokenizer: Any, task: str, **_: Any) -> Any:
        calls.append(task)
        return (TaskFigure(task, "acc", 0.5, None, None, None),)

    monkeypatch.setattr(Harness, "run", fake)
    command.run(arguments(place, tmp_path, *local(place, "tiny_choice")))
    limited = [*local(place, "tiny_choice"), "--limit", "3"]
    before = (tmp_path / "tasks" / "tiny_choice.base.json").read_bytes()
    with pytest.raises(ValueError, match=r"other inputs.*limit.*--overwrite"):
        command.run(arguments(place, tmp_path, *limited))
    assert (tmp_path / "tasks" / "tiny_choice.base.json").read_bytes() == before
    assert len(calls) == 2
    command.run(arguments(place, tmp_path, *limited, "--overwrite"))
    assert len(calls) == 4
    path = tmp_path / "tasks" / "tiny_choice.trained.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="is not an evaluation result"):
        command.run(arguments(place, tmp_path, *limited))


def test_the_key_follows_weights_and_settings_and_not_places(place: Path) -> None:
    def build(**settings: Any) -> PeftModel:
        return helpers.fsrl_model(decided(), sae=str(place / "sae"), **settings)

    first, again = build(), build()
    again.peft_config["default"].base_model_name_or_path = "elsewhere"
    assert digest_adapter(first) == digest_adapter(again)
    loaded = PeftModel.from_pretrained(decided(), place / "adapter")
    assert digest_adapter(loaded) == digest_adapter(first)
    assert digest_base(loaded) == digest_base(first) == digest_base(build(non_negative=False))
    with torch.no_grad():
        helpers.only_layer(again).fsrl_adapter["default"].bias[3] += 1e-3
    beside = build(modules_to_save=["lm_head"])
    models = (first, again, beside, build(non_negative=False), build(sae_dtype="bfloat16"))
    assert len({digest_adapter(model) for model in models}) == 5
    before = digest_base(beside)
    with torch.no_grad():
        beside.get_base_model().lm_head.modules_to_save["default"].weight += 1
    assert digest_base(beside) == before
    assert digest_adapter(beside) != digest_adapter(build(modules_to_save=["lm_head"]))


def test_results_follow_what_changed_in_place(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same names and paths, other content: nothing old is taken for it."""
    calls: list[str] = []

    def fake(self: Harness, model: Any, tokenizer: Any, task: str, **_: Any) -> Any:
        calls.append(task)
        return (TaskFigure(task, "acc", 0.5, None, None, None),)

    monkeypatch.setattr(Harness, "run", fake)
    here = shutil.copytree(place, tmp_path / "place")
    data = here / "tasks" / "data.jsonl"
    (here / "tasks" / "choice.yaml").write_text(CHOICE.format(data=data))
    base = ["--base-model", str(here / "model"), *local(here, "tiny_choice")]

    def evaluate(*more: str) -> int:
        calls.clear()
        command.run(arguments(here, tmp_path / "out", *base, *more))
        return len(calls)

    assert (evaluate(), evaluate()) == (2, 0)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0].replace('"answer": 0', '"answer": 1'), *lines[1:]]))
    with pytest.raises(ValueError, match=r"other inputs; .*'task': \("):
        evaluate()
    assert (evaluate("--overwrite"), evaluate()) == (2, 0)
    model = decided()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 1] += 1e-3
    model.save_pretrained(here / "model")
    with pytest.raises(ValueError, match=r"other inputs; .*'base': \("):
        evaluate()
    assert evaluate("--overwrite") == 2


def test_held_out_pairs_by_length(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--dataset", str(place / "pairs.json"), "--n-pairs", "10"]
    command.run(arguments(place, tmp_path, *more, "--beta", "2", "--gamma", "1"))
    found = Evaluation.from_json((tmp_path / "eval.json").read_text())
    model, rows = helpers.fsrl_model(decided()), helpers.tiny_preferences(12).select(range(10))
    settings = {"beta": 2.0, "gamma": 1.0, "batch_size": 8}
    trained = score_preferences(Session(model, helpers.tiny_tokenizer(), rows, **settings))
    with scale_steering(model, 0.0):
        base = score_preferences(Session(model, helpers.tiny_tokenizer(), rows, **settings))
    assert found.preferences is not None
    assert found.preferences.trained.margins == pytest.approx(trained.margins, abs=1e-5)
    assert found.preferences.base.margins == pytest.approx(base.margins, abs=1e-5)
    assert sum(bucket.n for bucket in found.preferences.buckets) == 10
    assert len(found.preferences.buckets) > 1
    assert found.tasks == ()
    assert f"{base.accuracy:.1%}" in capsys.readouterr().out


def test_an_output_that_is_a_file_is_refused_before_any_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_fsrl.analysis.evaluation.score_preferences", None)
    (tmp_path / "file").touch()
    more = ["--dataset", str(place / "pairs.json"), "--device", "cpu"]
    with pytest.raises(OSError, match="Expected a writable folder"):
        command.run(arguments(place, tmp_path / "file", *more))


def test_an_endpoint_that_is_down_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(lambda prompt: Reply(status=401)) as endpoint:
        words = [str(place / "adapter"), "--out", str(tmp_path), "--device", "cpu"]
        words += ["--dataset", str(place / "pairs.json"), "--max-new-tokens", "2"]
        words += ["--judge-url", endpoint.url, "--judge-model", "j"]
        assert main(["eval", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    [line] = [line for line in lines if line.startswith("error: ")]
    assert "stopped after 0 of" in line


def test_a_judge_at_an_endpoint_that_fails_half_way(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = 0

    def first_or_fail(prompt: str) -> Reply | str:
        nonlocal served
        served += 1
        assert "<request>" in prompt
        return Reply(status=401) if served > 4 else "It came first.\nVerdict: A"

    with serve(first_or_fail) as endpoint:
        more = ["--dataset", str(place / "pairs.json"), "--device", "cpu", "--max-new-tokens", "6"]
        more += ["--judge-url", endpoint.url, "--judge-model", "j", "--judge-prompts", "5"]
        with pytest.raises(JudgeError):
            command.run(arguments(place, tmp_path, *more))
        # What came before the judge is there.
        unfinished = Evaluation.from_json((tmp_path / "eval.json").read_text())
        assert unfinished.preferences is not None
        assert unfinished.win_rate is None
        kept = len((tmp_path / "judge.jsonl").read_text().splitlines())
        assert kept >= 4
        served = -100
        command.run(arguments(place, tmp_path, *more))
        # What had been answered is not asked again.
        assert served + 100 <= 10 - 4
    win_rate = Evaluation.from_json((tmp_path / "eval.json").read_text()).win_rate
    assert win_rate is not None
    assert (win_rate.n, win_rate.judge, win_rate.win_rate.value) == (5, "j", 0.5)
    assert (win_rate.consistency, win_rate.unreadable) == (0.0, 0)
    assert "j prefers trained to base in 50.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "there is nothing to evaluate"),
        (["--dataset", "x", "--judge-url", "u"], "both --judge-url and --judge-model"),
        (["--tasks", "x", "--judge-url", "u", "--judge-model", "m"], "pass --dataset"),
    ],
)
def test_options_that_make_no_sense(
    place: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        command.run(arguments(place, tmp_path, *more))


def test_tasks_that_cannot_be_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    def quick(include_path: str | None = None, include_defaults: bool = True) -> TaskManager:
        return TaskManager(include_path=str(place / "tasks"), include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", quick)
    with pytest.raises(ValueError, match=r"no task 'tiny_choise'; did you mean tiny_choice"):
        Harness(["tiny_choice", "tiny_choise"], place / "tasks")
    with pytest.raises(ValueError, match="at least one task"):
        Harness([])
    with pytest.raises(FileNotFoundError, match="Expected a folder of tasks at 'nowhere'"):
        Harness(["tiny_choice"], "nowhere")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "peft-fsrl\[eval\]"'):
        Harness(["mmlu"])


def test_a_table_with_a_task_that_has_run_on_one_model_alone() -> None:
    figures = (
        TaskFigure("t", "acc", 0.5, 0.01, 10, True),
        TaskFigure("t", "ppl,custom", 3, None, None, None),
    )
    one = TaskScores("t", "base", "{}", figures)
    two = TaskScores("t", "trained", "{}", (TaskFigure("t", "acc", 0.25, None, 10, True),))
    text = render_tasks([one, two])
    assert "0.5000 ± 0.0100" in text
    assert "-0.2500" in text
    assert next(line for line in text.splitlines() if "ppl" in line).split()[-2:] == ["-", "-"]


def test_pairs_as_text(place: Path) -> None:
    dataset = helpers.tiny_preferences(4)
    found = pair_texts(dataset, helpers.tiny_tokenizer(), 3)
    assert found == [dict(row) for row in dataset.select(range(3))]
    assert len(pair_texts(dataset, helpers.tiny_tokenizer())) == 4
    assert AnswerPair(*found[0].values()).prompt == found[0]["prompt"]
