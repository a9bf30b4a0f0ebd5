"""Adapters on the Hub: pushed and loaded back by the real client, against a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hub_server import TOKEN, Hub, running_hub

TESTS = Path(__file__).resolve().parents[1]
BIT_IDENTICAL = (
    "PeftModel",
    "AutoPeftModelForCausalLM",
    "AutoModelForCausalLM",
    "load_adapter",
    "second adapter",
    "main",
    "revision",
    "load_adapter revision",
    "subfolder",
    "load_adapter subfolder",
    "several layers",
    "pushed by transformers",
    "SAE by its name",
)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Hub]:
    """What the client printed, and what the server holds afterwards."""
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as (url, hub):
        done = subprocess.run(
            [sys.executable, str(TESTS / "hub_client.py"), str(folder)],
            env={
                **os.environ,
                "HF_ENDPOINT": url,
                "HF_HOME": str(folder / "home"),
                "HF_TOKEN": TOKEN,
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "NO_PROXY": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            },
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), hub


@pytest.mark.parametrize("way", BIT_IDENTICAL)
def test_what_comes_back_computes_the_same_bits(way: str, session: Any) -> None:
    results, _ = session
    assert results[way] is True


def test_no_way_was_left_out(session: Any) -> None:
    results, _ = session
    assert {name for name, value in results.items() if isinstance(value, bool)} == {
        *BIT_IDENTICAL,
        "config from the cache",
        "registered release",
        "hostile code ran",
    }
    assert results["config from the cache"]


def test_an_sae_with_an_address_is_not_uploaded(session: Any) -> None:
    results, hub = session
    assert results["reference"] == "team/saes/layer_1"
    named = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert set(results["files"]["team/named"]) == named
    [weights] = {
        files["adapter_model.safetensors"]
        for files in hub.commits["team/named"].values()
        if "adapter_model.safetensors" in files
    }
    # weight (24, 16), bias and threshold (24,) in float32, and the header of the file.
    assert 24 * 18 * 4 < len(weights) < 24 * 18 * 4 + 1000


def test_an_sae_without_an_address_lies_beside_the_adapter(session: Any) -> None:
    results, _ = session
    files = set(results["files"]["team/adapter"])
    assert {"sae/cfg.json", "sae/sae_weights.safetensors"} <= files
    assert {"deep/er/sae/cfg.json", "deep/er/adapter_config.json"} <= files


def test_a_release_of_the_registry_is_loaded_and_runs_no_code(session: Any) -> None:
    results, _ = session
    assert results["registered release"]
    assert results["registered hook"] == "blocks.0.attn.hook_z"
    assert "Weights only load failed" in results["hostile file"]
    assert not results["hostile code ran"]


def test_refusals_say_what_is_wrong(session: Any) -> None:
    results, _ = session
    assert "Can't find 'adapter_config.json' at 'team/nothing'" in results["missing repository"]
    assert "401" in results["wrong token"]
