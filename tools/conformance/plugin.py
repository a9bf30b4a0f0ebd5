"""Pytest plugin that points PEFT's tests at FSRL, without a change to any of their files.

Their matrices are lists that ``parametrize`` reads when a test file is collected. This plugin puts
FSRL's rows in place of all others just before that, and leaves out every test that has no matrix.
A test that ends in one of FSRL's own refusals (``REFUSALS``) is reported as skipped with the
refusal as the reason, so that everything before it has run and that the refusal itself is seen.
What is skipped is judged by run.py, which reads the outcomes from the file that this writes.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import pytest
import tiny
import torch

from peft_fsrl import FSRLConfig

PACKAGE = "peft_tests"
OUTCOMES = "CONFORMANCE_OUTCOMES"
# How the message of a deliberate refusal starts.
REFUSALS = (
    "An FSRL adapter cannot be merged into the base model",
    "Only one FSRL adapter can be active on a layer",
)
_MODEL_LIST = "MODELS_TO_TEST"
# Tests that leave at once unless the method is LoRA, though other methods can do the same.
_OPENED_GATES = ("test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches")

_matrices: dict[str, dict[str, Sequence[Any]]] = {}
_unused: set[tuple[str, str]] = set()
_adopted: set[str] = set()
_outcomes: dict[str, dict[str, Any]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Write the stand-ins for downloads and let PEFT's helper start FSRL adapters visibly."""
    tiny.write_all(Path.cwd())
    _matrices.update(cases.matrices())
    # The lists of models are not always a parameter; `_rename_models` fails without them.
    rows = {(file, name) for file in _matrices for name in _matrices[file]}
    _unused.update((file, name) for file, name in rows if not name.endswith(_MODEL_LIST))
    testing_utils = importlib.import_module(f"{PACKAGE}.testing_utils")
    original = testing_utils.set_init_weights_false

    def set_init_weights_false(config_cls: type, kwargs: dict[str, Any]) -> Any:
        if issubclass(config_cls, FSRLConfig):
            return {**kwargs, "init_scale": cases.VISIBLE_SCALE}
        return original(config_cls, kwargs)

    # Test files import it by name, later than this.
    vars(testing_utils)["set_init_weights_false"] = set_init_weights_false


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the rows of PEFT's matrices with FSRL's."""
    file = metafunc.module.__name__.rpartition(".")[2]
    for mark in metafunc.definition.iter_markers("parametrize"):
        name = _row_name(mark, metafunc, _matrices.get(file, {}))
        if name is not None:
            # A mark is frozen, but nothing else offers its values before they are read.
            object.__setattr__(mark, "args", (mark.args[0], _matrices[file][name], *mark.args[2:]))
            _unused.discard((file, name))
            if "config" in str(mark.args[0]):
                _adopted.add(metafunc.definition.nodeid)


def _row_name(
    mark: pytest.Mark, metafunc: pytest.Metafunc, rows: dict[str, Sequence[Any]]
) -> str | None:
    test = metafunc.definition.name
    if "config" in str(mark.args[0]) and test in rows:
        return test
    same = (name for name in rows if mark.args[1] is getattr(metafunc.module, name, None))
    return next(same, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not FSRL's, and make the lists that tests read by name ours too."""
    ours = [item for item in items if item.nodeid.partition("[")[0] in _adopted]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
    for module in {item.module for item in ours if isinstance(item, pytest.Function)}:
        _rename_models(module)


def _rename_models(module: ModuleType) -> None:
    for name, rows in _matrices[module.__name__.rpartition(".")[2]].items():
        if name.endswith(_MODEL_LIST):
            vars(module)[name][:] = rows


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _open_gates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FSRL pass for LoRA where a test asks for LoRA by name and for nothing else of it."""
    if request.node.originalname in _OPENED_GATES:
        monkeypatch.setattr(request.module, "LoraConfig", FSRLConfig, raising=False)
        common = importlib.import_module(f"{PACKAGE}.testing_common")
        monkeypatch.setattr(common, "LoraConfig", FSRLConfig)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a refusal into a skip."""
    report = yield
    if report.failed and call.excinfo is not None and call.excinfo.errisinstance(ValueError):
        message = str(call.excinfo.value)
        if message.startswith(REFUSALS):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"Refused: {message}")
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst outcome of a test's three phases."""
    test = _outcomes.setdefault(report.nodeid, {"outcome": "passed", "reason": "", "seconds": 0.0})
    test["seconds"] += report.duration
    if report.failed:
        test.update(outcome="failed", reason=_failure_reason(report.longrepr))
    elif report.skipped and test["outcome"] == "passed":
        test.update(outcome="skipped", reason=_skip_reason(report.longrepr))


def _failure_reason(longrepr: Any) -> str:
    crash = getattr(longrepr, "reprcrash", None)
    return " ".join(str(longrepr if crash is None else crash.message).split())


def _skip_reason(longrepr: Any) -> str:
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the outcomes to run.py."""
    found = {"tests": _outcomes, "unused_rows": [": ".join(row) for row in sorted(_unused)]}
    Path(os.environ[OUTCOMES]).write_text(json.dumps(found))
