"""Counters reach the process that is asked for them, and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from peft_fsrl.serving import counters
from peft_fsrl.serving.counters import VARIABLE, Collector, Counters


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "counters"
    found.write_bytes(bytes(2 * 3 * 8))
    monkeypatch.setenv(VARIABLE, str(found))
    return found


def test_what_the_engine_counts_is_read_by_the_collector(path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM: make serving")
    collector, engine = Collector(path, ["one", "two"]), Counters(["one", "two"])
    engine.add("two", torch.tensor([3.0, 0.0, 5.0]), torch.tensor([0.0, 1.0, 0.0]))
    engine.flush()
    engine.add("two", torch.tensor([4.0]), torch.tensor([1.0]))
    engine.flush()
    found = {
        (sample.name, sample.labels["adapter"]): sample.value
        for family in collector.collect()
        for sample in family.samples
    }
    expected = {"steered_tokens": 4, "steered_features": 12, "nonfinite_tokens": 2}
    for name, value in expected.items():
        assert found[f"peft_fsrl_{name}_total", "two"] == value
        assert found[f"peft_fsrl_{name}_total", "one"] == 0


def test_the_file_has_no_name_once_the_engine_has_it(path: Path) -> None:
    Counters(["one", "two"])
    assert not path.exists()


def test_several_api_servers_get_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM: make serving")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(counters.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    counters.publish(["one"])
    assert VARIABLE not in os.environ
    assert list(tmp_path.iterdir()) == []
