"""Counters reach the process that is asked for them, and leave nothing behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from peft_fsrl.serving import counters
from peft_fsrl.serving.counters import VARIABLE, Collector, Counters

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    made = Collector(["one", "two"])
    monkeypatch.setenv(VARIABLE, made.path)
    yield made
    made.close()


def count() -> None:
    engine = Counters(["one", "two"])
    engine.add("two", torch.tensor([3.0, 0.0, 5.0]), torch.tensor([0.0, 1.0, 0.0]))
    engine.flush()
    engine.add("two", torch.tensor([4.0]), torch.tensor([1.0]))
    engine.flush()


def test_what_the_engine_counts_is_in_a_file_without_a_name(collector: Collector) -> None:
    count()
    assert collector._totals.tolist() == [[0, 0, 0], [4, 12, 2]]
    assert os.stat(collector.path).st_nlink == 0


def test_what_the_engine_counts_is_shown(collector: Collector) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM: make serving")
    count()
    found = {
        (sample.name, sample.labels["adapter"]): sample.value
        for family in collector.collect()
        for sample in family.samples
    }
    expected = {"steered_tokens": 4, "steered_features": 12, "nonfinite_tokens": 2}
    for name, value in expected.items():
        assert found[f"peft_fsrl_{name}_total", "two"] == value
        assert found[f"peft_fsrl_{name}_total", "one"] == 0


def test_several_api_servers_get_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM: make serving")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    counters.publish(["one"])
    assert VARIABLE not in os.environ
