"""The commands as people run them, on the model organism, and what they say when they cannot."""

from __future__ import annotations

import argparse
import json
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from judge_server import Reply, serve
from peft_fsrl import FSRLConfig, organism
from peft_fsrl.analysis import AdapterDifference, Audit, Checkup, Inspection, statistics
from peft_fsrl.analysis.data import Curation, DataContrast
from peft_fsrl.analysis.data import reading as data_reading
from peft_fsrl.analysis.labels import load_labels, organism_labels, save_labels
from peft_fsrl.cli._inputs import load_rows, open_session
from peft_fsrl.cli.audit import add_arguments
from peft_fsrl.cli.diff import require_same_saes
from peft_fsrl.cli.main import COMMANDS, DOES_NOT_FIT, main, make_parser, one_line, say
from peft_fsrl.extras import install_command

DATA = ["--dataset", "organism", "--n-pairs", "6"]
QUICK = ["--n-generations", "1", "--n-coherence", "2", "--max-new-tokens", "4"]
QUICK += ["--n-random", "1", "--n-single", "1"]


def make_adapter(folder: Path, seed: int = 0, sae: Any = None) -> Path:
    """An adapter that steers some features of the organism, untrained."""
    built = organism.load()
    config = FSRLConfig(
        layer=built.layer,
        sae=str(built.sae_path) if sae is None else sae,
        init_scale=0.02,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    model = get_peft_model(built.load_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fsrl_adapter" in name and name.endswith("threshold"):
                parameter.fill_(0.35)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a wrong request is answered with."""
    capsys.readouterr()
    try:
        status: Any = main([str(each) for each in arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    # The parser's own words have the command before them, and the usage above.
    [line] = [each for each in capsys.readouterr().err.splitlines() if "error: " in each]
    return line


def test_audit(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    out = tmp_path / "report"
    command = ["audit", str(copy), "--out", str(out), *DATA, *QUICK, "--labels", "organism"]
    truth, other = organism_labels(organism.load()), tmp_path / "other.json"
    save_labels(replace(truth, features=truth.features[:-1], source="others"), other)
    command += ["--categories", "style,honesty", "--reference-labels", str(other)]
    assert main([*command, "--update-card", "--name", "mine"]) == 0
    said = capsys.readouterr().out
    audit = Audit.from_json((out / "audit.json").read_text())
    page = (out / "audit.html").read_text()
    for finding in audit.findings:
        assert finding.question in said
        assert finding.question in page
    assert max(map(len, said.splitlines()[:-1])) < 100
    assert audit.n_pairs == 6
    assert audit.info.adapter == "mine"
    assert [ablation.name for ablation in audit.ablations] == ["style", "honesty"]
    assert "style 0.9" in audit.dataset
    assert str(Path.cwd()) not in page, "where things lay on this machine is nobody's business"
    assert page.count('class="plot"') == 2
    assert "fsrl-audit:start" in (copy / "README.md").read_text()

    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert main(command) == 0
    assert parts == {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}


def test_the_quality_of_labels_is_said_for_all_or_for_each(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["adapter", "--out", "out", "--dataset", "organism", "--label-mcc"]
    assert parser.parse_args([*given, "0.448"]).label_mcc == 0.448
    each = parser.parse_args([*given, "style=0.461, honesty=0.5"]).label_mcc
    assert each == {"style": 0.461, "honesty": 0.5}
    command = ["audit", str(adapter), "--out", str(tmp_path / "report"), *DATA, *QUICK]
    command += ["--labels", "organism", "--categories", "style", "--label-mcc"]
    assert main([*command, "honesty=0.5"]) == 2
    error = capsys.readouterr().err
    assert "got one for ['honesty']" in error
    for wrong in ("style=good", "good"):
        with pytest.raises(SystemExit):
            main([*command, wrong])
        assert "--label-mcc" in capsys.readouterr().err.splitlines()[-1]


# Older releases of datasets leave a CSV file open.
OPEN_FILES = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@OPEN_FILES
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ""])
def test_data_sets_on_disk(
    adapter: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = organism.preferences(5, seed=1).select_columns(["prompt", "chosen", "rejected"])
    path = tmp_path / f"pairs{suffix}"
    {
        ".json": lambda: pairs.to_json(path),
        ".jsonl": lambda: pairs.to_json(path),
        ".csv": lambda: pairs.to_csv(path),
        ".parquet": lambda: pairs.to_parquet(path),
        "": lambda: pairs.save_to_disk(path),
    }[suffix]()
    arguments = ["--dataset", str(path), "--n-pairs", "0", "--json"]
    assert main(["diff", str(adapter), str(adapter), *arguments]) == 0
    record = AdapterDifference.from_json(capsys.readouterr().out)
    assert record.dataset == path.name
    assert record.n_tokens > 0


def test_checkup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["checkup", "--model", "organism", "--sae", "organism", *DATA]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    record = Checkup.from_json((tmp_path / "out" / "checkup.json").read_text())
    assert all(finding.answer.split()[0] in said for finding in record.findings)
    assert main([*command, "--layer", "3"]) == DOES_NOT_FIT
    assert "It fits better nearby" in capsys.readouterr().out
    text = tmp_path / "plain.jsonl"
    said = organism.preferences(8, seed=2)["chosen"]
    Dataset.from_list([{"text": each} for each in (*said, "", None)]).to_json(text)
    assert main([*command[:5], "--dataset", str(text)]) == 0


def test_inspect(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "inspection"
    command = ["inspect", str(adapter), "--out", str(out), "--labels", "organism", "--name", "mine"]
    quick = ["--n-texts", "4", "--n-targets", "2", "--steps", "2", "--candidates", "4"]
    assert main([*command, *quick]) == 0
    said = capsys.readouterr().out
    record = Inspection.from_json((out / "inspect.json").read_text())
    assert all(finding.question in said for finding in record.findings)
    assert max(map(len, said.splitlines()[:-1])) < 100
    assert record.info.adapter == "mine"
    assert record.n_texts == 4
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert parts
    assert main([*command, *quick]) == 0
    assert parts == {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert main([*command, *quick, *DATA]) == 0
    assert "6 given ones" in " ".join(capsys.readouterr().out.split())
    assert "n_targets of 0 or more" in refusal(capsys, *command, "--n-targets", "-1")
    file = tmp_path / "file"
    file.touch()
    assert "Expected a writable folder at" in refusal(capsys, "inspect", adapter, "--out", file)


def test_labels(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = 0

    def answer(prompt: str) -> Reply | str:
        nonlocal served
        served += 1
        if served > most:
            return Reply(status=401)
        if "Description: bullet points" not in prompt:
            return "DESCRIPTION: bullet points"
        return "ACTIVE: 1" if "\nTexts:\n" in prompt else "ANSWER: yes\nCONFIDENCE: 90"

    folder = tmp_path / "new" / "labels"
    out = folder / "labels.json"
    with serve(answer) as endpoint:
        request = [
            "labels",
            str(adapter),
            *DATA[:3],
            "40",
            "--out",
            str(folder),
            "--n-features",
            "3",
        ]
        request += ["--judge-url", endpoint.url, "--judge-model", "m"]
        most = 4
        assert "the same call asks for the rest alone" in refusal(capsys, *request)
        assert not out.exists()
        most = 99
        assert main(request) == 0
        # A description, two categories and a test of three features.
        answers = (folder / "answers.jsonl").read_text().splitlines()
        assert len(answers) == 3 * 4
        before = served
        assert main(request) == 0
        assert served == before, "answers are remembered"
    text = capsys.readouterr().out
    assert "3 features labeled: 3 alignment, 3 style" in text
    assert "held-out texts apart with accuracy" in text
    labels = load_labels(out)
    assert [each.description for each in labels.features] == ["bullet points"] * 3
    assert labels.d_sae == organism.load().manifest["sae"]["d_sae"]
    assert labels.fingerprint is not None
    assert all(0 <= each.quality <= 1 for each in labels.features if each.quality is not None)
    audit = ["audit", str(adapter), *DATA, *QUICK, "--out", str(tmp_path / "audit")]
    assert main([*audit, "--labels", str(out)]) == 0
    assert "n-features of 0 or more" in refusal(capsys, *request, "--n-features", "-1")


def test_diff(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_adapter(tmp_path / "other", seed=1)
    arguments = ["diff", str(adapter), str(other), *DATA, "--labels", "organism"]
    assert "--n-features of 0 or more, got -1" in refusal(capsys, *arguments, "--n-features", -1)
    foreign = tmp_path / "foreign.json"
    save_labels(replace(organism_labels(organism.load()), fingerprint="0" * 64), foreign)
    assert "this one has" in refusal(capsys, *arguments[:-1], foreign)
    assert main([*arguments, "--n-features", "3"]) == 0
    said = capsys.readouterr().out
    assert f"A  {adapter}" in said
    assert len(said.split("cosine")[1].strip().splitlines()) == 3


def test_adapters_that_cannot_be_compared(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sae_lens import SAE

    sae = SAE.load_from_disk(organism.load().sae_path)
    with torch.no_grad():
        sae.W_enc[0, 0] += 1
    foreign = make_adapter(tmp_path / "foreign", sae=sae)
    assert "on the same SAE, found" in refusal(capsys, "diff", adapter, foreign, *DATA)


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ({"1": "a", "2": "b"}, {"1": "a", "2": "b"}, True),
        ({"1": "a", "2": "b"}, {"1": "a", "2": "c"}, False),
        ({"1": "a", "2": "b"}, {"1": "a"}, False),
        ({"": "a"}, {"": "c"}, False),
        ({"": "a"}, {"1": "a"}, True),
        ({"": "a"}, {}, True),
    ],
)
def test_saes_are_compared_layer_by_layer(
    first: dict[str, str], second: dict[str, str], alike: bool
) -> None:
    infos = [
        {layer: {"fingerprint": each} for layer, each in found.items()} or None
        for found in (first, second)
    ]
    args = argparse.Namespace(first="one", second="other")
    with nullcontext() if alike else pytest.raises(ValueError, match="on the same SAE, found"):
        require_same_saes(args, *infos)


def test_what_is_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "out", *DATA]
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json" in refusal(capsys, "audit", tmp_path / "empty", *out)
    built = organism.load()
    lora = get_peft_model(built.load_model(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(str(tmp_path / "lora"))
    line = refusal(capsys, "audit", tmp_path / "lora", *out)
    assert "Expected an FSRL adapter" in line
    assert "LORA" in line
    assert not (tmp_path / "out").exists()


def test_damaged_adapters(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "out", *DATA]
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be read" in refusal(capsys, "audit", copy, *out)
    rows = {name: tensor[:10].clone() for name, tensor in load_file(adapter / weights.name).items()}
    save_file(rows, weights)
    assert "belong to another adapter_config.json" in refusal(capsys, "audit", copy, *out)

    config = copy / "adapter_config.json"
    whole = config.read_text()
    config.write_text(whole[:20])
    assert f"The config in {copy} cannot be read" in refusal(capsys, "audit", copy, *out)
    config.write_text(whole)
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": "/nowhere/at/all"}
    config.write_text(json.dumps(settings))
    assert "--base-model" in refusal(capsys, "audit", copy, *out)


@OPEN_FILES
def test_data_that_nobody_can_audit(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        out = tmp_path / "out"
        return refusal(capsys, "audit", adapter, "--out", out, "--dataset", tmp_path / name)

    assert "'rejected'" in refused("columns.jsonl", '{"prompt": "a", "chosen": "b"}\n')
    same = '{"prompt": "a", "chosen": "b", "rejected": "b"}\n'
    assert "at least one usable preference pair" in refused("same.jsonl", same)
    assert "cannot be read as a data set" in refused("broken.jsonl", '{"prompt": "a", ')
    assert "no row" in refused("empty.csv", "prompt,chosen,rejected\n")
    assert "ends in .json" in refused("pairs.txt", "hello")
    assert "no row" in refused("empty.jsonl", "")
    assert "no row" in refused("blank.json", "\n")
    out = ["--out", tmp_path / "out"]
    missing = tmp_path / "missing.jsonl"
    assert "no such file" in refusal(capsys, "audit", adapter, *out, "--dataset", missing)
    DatasetDict(train=organism.preferences(2)).save_to_disk(tmp_path / "splits")
    line = refusal(capsys, "audit", adapter, *out, "--dataset", tmp_path / "splits")
    assert "Expected a split 'test'" in line
    assert "['train']" in line
    one = json.dumps(organism.preferences(1)[0])
    assert "at least two held-out" in refused("one.jsonl", f"{one}\n")


def test_amounts_out_of_range(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for option, value in (
        ("--batch-size", 0), ("--n-generations", -1), ("--max-new-tokens", 0), ("--beta", "nan"),
        ("--n-pairs", -3), ("--max-length", 0), ("--seed", -1), ("--dtype", "float31"),
        ("--device", "cuda:77"), ("--device", "nowhere"),
    ):  # fmt: skip
        line = refusal(capsys, "audit", adapter, "--out", out, *DATA, option, value)
        assert option[2:] in line.replace("_", "-")
        assert str(value) in line
    assert not out.exists()


def test_an_out_that_is_a_file_is_refused_before_any_work(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def work(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr("peft_fsrl.analysis.audit.stages.score_preferences", work)
    (tmp_path / "file").write_text("mine")
    line = refusal(capsys, "audit", adapter, "--out", tmp_path / "file", *DATA)
    assert "Expected a writable folder" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_labels_that_do_not_belong(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        out = ["--out", tmp_path / "out", *DATA]
        return refusal(capsys, "audit", adapter, *out, "--labels", tmp_path / name)

    assert "not JSON" in refused("labels.json", '{"1": ["style"')
    assert "expected the columns" in refused("labels.csv", "a,b\n1,style\n")
    assert "expected 0 to 383" in refused("foreign.csv", "feature,category\n99999,style\n")
    assert "Expected a file of labels" in refusal(
        capsys, "audit", adapter, "--out", tmp_path, *DATA, "--labels", tmp_path / "none.csv"
    )
    line = refusal(
        capsys, "audit", adapter, "--out", tmp_path, *DATA,
        "--labels", "organism", "--categories", "color",
    )  # fmt: skip
    assert "color" in line


def test_a_missing_extra_is_said_at_once(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "scipy", None)
    out = tmp_path / "out"
    assert install_command("audit") in refusal(capsys, "audit", adapter, "--out", out, *DATA)
    assert not out.exists()
    monkeypatch.undo()
    statistics.require()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refusal(capsys, "audit", adapter, "--out", out, *DATA)
    assert "matplotlib" in line


def test_an_interrupted_audit_keeps_what_it_has(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from peft_fsrl.analysis.audit import stages

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "compare_generations", interrupt)
    out = tmp_path / "out"
    assert main(["audit", str(adapter), "--out", str(out), *DATA, *QUICK]) == 130
    assert "Run the same command again to resume" in capsys.readouterr().err
    kept = {path.stem for path in (out / "parts").iterdir()}
    assert {"scores_base", "scores_trained", "usages", "coherence", "single"} <= kept
    assert not (out / "audit.json").exists()


LENS = ["data", "--model", "organism", "--sae", "organism", "--dataset", "organism"]


def test_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What was curated is read from a file with all its columns, messages as they were.
    rows = organism.preferences(120, seed="file", conversational=True)
    rows.to_json(tmp_path / "pairs.jsonl")
    command = [*LENS[:-1], str(tmp_path / "pairs.jsonl"), "--labels", "organism"]
    command += ["--categories", "style,honesty", "--topic", "topic", "--out", str(tmp_path / "out")]
    assert main([*command, "--n-examples", "1"]) == 0
    said = capsys.readouterr().out
    record = DataContrast.from_json((tmp_path / "out" / "data.json").read_text())
    assert [each.category for each in record.categories] == ["all features", "style", "honesty"]
    assert (record.n_pairs, record.n_topics) == (120, 4)
    assert f"{record.n_separating} of {record.n_tested} tested" in said
    assert f"\n{record.features[0].feature} " in said
    assert "chosen    " in said
    assert "rejected  " in said
    assert max(map(len, said.splitlines())) <= 98
    assert not (tmp_path / "out" / "curated.jsonl").exists()
    # What was read is not read again.
    monkeypatch.delattr(data_reading, "_read")
    for action in ("drop", "relabel"):
        assert main([*command, f"--{action}", "style, 137"]) == 0
        assert "pairs are " + {"drop": "dropped", "relabel": "flipped"}[action] in " ".join(
            capsys.readouterr().out.split()
        )
        copy = Dataset.from_json(str(tmp_path / "out" / "curated.jsonl"))
        curation = Curation.from_json((tmp_path / "out" / "curation.json").read_text())
        assert curation.features == tuple(sorted(organism.load().features("style")))
        assert set(copy.column_names) == set(rows.column_names)
        changed = len(curation.rows)
        assert changed > 30
        assert len(copy) == (120 - changed if action == "drop" else 120)
        assert copy[0]["chosen"][0]["role"] == "assistant"
        assert 0.47 < sum(copy["chosen_style"]) / len(copy) < (0.53 if action == "drop" else 0.65)


def test_wrong_requests_about_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [*LENS, "--out", tmp_path / "out", "--n-pairs", "24"]
    for more, message in (
        (["--topic", "mood"], "Expected a column 'mood' with topics, found ["),
        (["--drop", "style"], "or categories with --labels, got 'style'."),
        (["--drop", "6²"], "got '6²'."),
        (["--labels", "organism", "--relabel", "mood"], "got 'mood'."),
        (["--categories", "style"], "--categories needs --labels"),
        (["--labels", "organism", "--categories", "mood"], "categories that the labels know"),
        (["--drop", "384"], "Feature 384 does not exist"),
        (["--n-topics", "0"], "--n-topics: expected 1 or more, got 0"),
        (["--n-pairs", "5"], "at least 20 different preference pairs"),
        (["--layer", "9"], "Layer 9 does not exist"),
        (["--sae", tmp_path / "none"], "none"),
    ):
        assert message in refusal(capsys, *wrong, *more)
    with pytest.raises(SystemExit):
        main([*map(str, wrong), "--drop", "1", "--relabel", "2"])
    capsys.readouterr()
    rows = [{"prompt": "a", "chosen": 1, "rejected": 2}]
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps(rows))
    line = refusal(capsys, *LENS[:-1], path, "--out", tmp_path / "out")
    assert "neither text nor messages: 1" in line


def test_an_adapter_without_weights(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    (copy / "adapter_model.safetensors").unlink()
    line = refusal(capsys, "inspect", copy, "--out", tmp_path / "out")
    assert f"Expected adapter_model.safetensors in {copy}, found none" in line


@pytest.mark.parametrize("texts", [[3, 4], [["a"], ["b"]]])
def test_texts_that_are_none(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: list[Any]
) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([{"text": text} for text in texts]))
    line = refusal(capsys, "inspect", adapter, "--dataset", path, "--out", tmp_path / "out")
    assert "Expected texts in the column 'text'" in line


def test_max_length_cuts_answers_as_a_trainer_does() -> None:
    arguments = [*LENS, "--out", "unused", "--n-pairs", "3", "--max-length", "20"]
    args = make_parser(arguments).parse_args(arguments)
    tokenizer = organism.load().load_tokenizer()
    rows, _ = load_rows(args, tokenizer)
    session = open_session(organism.load().load_model(), tokenizer, rows, args)
    assert {len(text.input_ids) for text in session.tokens("chosen")} == {20}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "where", "kept"),
    [
        (
            "audit", [*DATA, *QUICK],
            "from peft_fsrl.analysis.audit import stages; stages.compare_static_dynamic = kill",
            {"scores_base", "usages", "single"},
        ),
        (
            "data", [*LENS[1:], "--n-pairs", "100", "--n-examples", "1"],
            "from peft_fsrl.analysis.data import reading; read = reading._read; "
            "reading._read = lambda some: read(some) if len(some.rows) == 64 else kill()",
            {"pairs-0000000"},
        ),
        (
            "inspect", ["--n-texts", "16", "--steps", "2", "--candidates", "4"],
            "from peft_fsrl.analysis.inspection import _Search; _Search.loudest = kill",
            {"triggers_0", "triggers_1", "triggers_2", "triggers_3"},
        ),
    ],
    ids=["audit", "data", "inspect"],
)  # fmt: skip
def test_a_command_that_is_killed_goes_on(
    adapter: Path, tmp_path: Path, name: str, options: list[str], where: str, kept: set[str]
) -> None:
    out = tmp_path / "out"
    command = [name, *([] if name == "data" else [str(adapter)]), "--out", str(out), *options]
    code = f"""
import os, signal
from peft_fsrl.cli.main import main
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
{where}
main({command!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert kept <= {path.stem for path in parts}
    assert not list(out.glob("*.json"))
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in parts} == parts, "nothing was made twice"
    assert (out / f"{name}.json").exists()


def test_no_code_from_a_repository_runs(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = tmp_path / "model"
    shutil.copytree(organism.load().model_path, model)
    mark = tmp_path / "ran"
    (model / "code.py").write_text(
        f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass"
    )
    places = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    places["AutoTokenizer"] = ["code.Model", None]
    for name, changes in (
        ("config.json", {"model_type": "unknown", "architectures": None}),
        ("tokenizer_config.json", {"tokenizer_class": "Unknown"}),
    ):
        settings = json.loads((model / name).read_text()) | {"auto_map": places} | changes
        (model / name).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    out = ["--out", tmp_path / "out", *DATA, "--base-model", model]
    assert "trust_remote_code" in refusal(capsys, "audit", adapter, *out)
    checkup = ["checkup", "--model", model, "--sae", "organism", *DATA]
    assert "trust_remote_code" in refusal(capsys, *checkup)
    assert not mark.exists()


def test_what_is_said_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("red \x1b[31m \x9b31m half \ud800 end")
    assert capsys.readouterr().out == "red \ufffd[31m \ufffd31m half \ufffd end\n"
    assert one_line(ValueError("a\x1b]0;title\x07\nb")) == "a\ufffd]0;title\ufffd b"


def test_debug_shows_where(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="file of labels"):
        main(["audit", str(adapter), "--out", str(tmp_path), *DATA, "--labels", "x.csv", "--debug"])


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(
    command: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = [] if command is None else [command]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()[:3]) == f"usage: peft-fsrl {command or 'COMMAND'}"
    # A screen of a terminal that fills a laptop's.
    assert len(lines) <= 42
    assert max(map(len, lines)) < 80
    # It ends with a command that can be typed as it stands.
    example = "\n".join(lines[lines.index("example:") + 1 :]).replace("\\\n", "")
    program, *given = shlex.split(example)
    assert program == "peft-fsrl"
    assert given[0] == (command or "checkup")
    parsed = make_parser(given).parse_args(given)
    assert callable(parsed.run)


def options_of(command: str) -> dict[str, argparse.Action]:
    """The options of a command, by name."""
    [choices] = [each.choices for each in make_parser([command])._actions if each.choices]
    parser: Any = dict(choices)[command]
    return {name: each for each in parser._actions for name in each.option_strings}


def test_an_option_means_the_same_in_every_command() -> None:
    # The text of --out names the files, --labels' is of what there is to label.
    told: dict[str, set[tuple[object, ...]]] = {}
    for command in COMMANDS:
        for name, each in options_of(command).items():
            if name in ("--out", "--json", "--dataset", "--labels", "--device", "--seed", "--name"):
                text = None if name in ("--out", "--labels") else each.help
                told.setdefault(name, set()).add((each.type, each.metavar, each.nargs, text))
    assert {name for name, kinds in told.items() if len(kinds) > 1} == set()
    assert told["--out"] == {(Path, "FOLDER", None, None)}
    assert told["--json"] == {(None, None, 0, "print the record as JSON instead of the report")}


def test_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["peft-fsrl", "checkup"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("peft_fsrl", run_name="__main__")
    assert stop.value.code == 2
    assert "--model" in capsys.readouterr().err
