"""``examples/paper.py`` with a stand-in for the training, and on an adapter of two steps."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Takes simpo.py's place: figures that follow from its options, and a summary kept from elsewhere.
STAND_IN = """
import json, sys
from pathlib import Path
here, arguments, flags = Path(__file__).parent, sys.argv[1:], {}
for argument in arguments:
    if argument.startswith("--"):
        name, _, value = argument.removeprefix("--").partition("=")
        flags[name] = [value] if value else []
    else:
        flags[name].append(argument)
with (here / "calls.txt").open("a") as file:
    file.write(json.dumps(flags) + "\\n")
out = Path(flags["output_dir"][0])
out.mkdir(parents=True, exist_ok=True)
(out / "summary.json").write_text((here / "summary.json").read_text())
loss = 1.0 + len(flags.get("exclude_features", ())) + int(flags["seed"][0])
names = ["eval_fsrl/l0", "eval_fsrl/l1", "eval_rewards/accuracies", "eval_coherence/perplexity"]
(out / "eval_results.json").write_text(json.dumps({"eval_loss": loss, **dict.fromkeys(names, 0.5)}))
"""


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import paper
    import sweep

    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "SCRIPT", tmp_path / "stand_in.py")
    scores = SimpleNamespace(rise=SimpleNamespace(value=2.0), mass=0.25)
    said = [SimpleNamespace(name=name, text=f" {name} said ") for name in ("base", "trained", "x")]
    summary = SimpleNamespace(ablations=[scores], generations=[SimpleNamespace(continuations=said)])
    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setattr(paper, "summary_of", lambda table, name: summary)
    return paper


def run(paper: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    arguments = ["paper.py", *given, "--out", str(folder / "out"), "--seeds", "0", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    paper.main()


def test_variants_differ_from_the_default_by_what_they_say(
    paper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(paper, tmp_path, monkeypatch, "variants", "--max_steps=2")
    calls = [json.loads(line) for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert len(calls) == len(paper.VARIANTS)
    assert {call["max_steps"][0] for call in calls} == {"2"}
    assert [call["optimizer"] for call in calls if "optimizer" in call] == [["muon"]] * 3
    text = (tmp_path / "out" / "variants.md").read_text()
    assert text.count("| 1.000 | 50.0% | 0.50 | 0.50 | 25.0% | +2.000 | 0.50 |") == len(calls)
    run(paper, tmp_path, monkeypatch, "variants", "--max_steps=2")
    assert (tmp_path / "calls.txt").read_text().count("\n") == len(calls), "made again"


def test_exclusion_is_over_seeds_and_shows_what_is_said_without_style(
    paper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(paper, tmp_path, monkeypatch, "exclusion")
    calls = [json.loads(line) for line in (tmp_path / "calls.txt").read_text().splitlines()]
    style = paper.organism.load().features("style")
    excluded = [call.get("exclude_features") for call in calls]
    assert excluded == [None, None, [str(f) for f in style], [str(f) for f in style], None, None]
    assert [call.get("exclude_random") for call in calls][4:] == [[str(len(style))]] * 2
    text = (tmp_path / "out" / "exclusion.md").read_text()
    # Losses 15 and 17 without the fourteen, 1 and 3 with all.
    assert f"| without the {len(style)} that detect style | 16.000 ± 1.414 |" in text
    assert "| all features | 2.000 ± 1.414 |" in text
    assert "base            base said\ntrained         trained said\n" in text
    with pytest.raises(SystemExit):
        run(paper, tmp_path, monkeypatch, "everything")


def test_other_texts_are_words_of_the_world(paper: ModuleType) -> None:
    tokenizer = paper.organism.load().load_tokenizer()
    texts = paper.other_texts(5)
    assert list(texts) == ["almanac", "rumour", "quiz"]
    for kind, rows in texts.items():
        assert len({row["text"] for row in rows}) == 5
        assert all(row["text"].startswith(kind) for row in rows)
        ids = [i for row in rows for i in tokenizer(row["text"])["input_ids"]]
        assert tokenizer.unk_token_id not in ids
