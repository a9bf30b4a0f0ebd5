"""Every benchmark runs, at sizes that say nothing, and its record fills the page."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("operation", "generation", "whole_model", "startup")


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Any:
    """As if started from their own folder, which is how they find one another."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in {"common", "run", *NAMES} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore:It is strongly recommended to train Gemma2")
@pytest.mark.parametrize("name", NAMES)
def test_quick_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(name).main(["--quick", "--out", str(tmp_path)])
    record = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    assert record["figures"]
    printed = capsys.readouterr().out
    for table in record["tables"]:
        assert table["rows"]
        assert all(len(row) == len(table["header"]) for row in table["rows"])
        assert "| " + " | ".join(table["rows"][0]) + " |" in printed
    run = importlib.import_module("run")
    marks = "".join(f"<!-- {each} -->\nold {each}\n<!-- /{each} -->\n" for each in NAMES)
    page = run.fill_page(marks, tmp_path)
    assert f"old {name}" not in page
    assert record["tables"][0]["title"] in page
    assert page.count("old") == len(NAMES) - 1
    assert run.fill_page(page, tmp_path) == page


def test_the_page_has_room_for_every_table() -> None:
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    for name in NAMES:
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- /{name} -->") == 1


def test_the_plain_implementation_computes_the_same() -> None:
    common = importlib.import_module("common")
    case = common.make_case(16, 64, 5)
    case.set_density(0.3)
    events: list[Any] = []
    case.layer.observers.append(events.append)
    output, l0, l1, l2 = common.plain_steer(case, case.x)
    torch.testing.assert_close(case.layer(case.x), output)
    v = events[0].steering_vector
    assert (v != 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(l0, (v != 0).sum(-1))
    torch.testing.assert_close(l1, events[0].l1)
    torch.testing.assert_close(l2, v.square().sum(-1).sqrt())


def test_bytes_kept_are_counted_once_and_without_weights() -> None:
    common = importlib.import_module("common")
    linear = torch.nn.Linear(8, 4)
    x = torch.randn(1024, 8, requires_grad=True)
    with common.kept_for_backward(linear) as kept:
        _ = linear(x).square().sum() + linear(x).square().sum()
    # The input once, and both outputs.
    assert kept == [pytest.approx((1024 * 8 + 2 * 1024 * 4) * 4 / 2**20)]


def test_ratios_are_of_what_ran_side_by_side() -> None:
    common = importlib.import_module("common")
    assert common.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == {
        "median": 3.0,
        "low": 2.5,
        "high": 3.5,
    }
