"""The recipe of the example's SAE, on a tiny Llama: its text, its activations, its figures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import VOCABULARY, tiny_model, tiny_tokenizer
from peft_fsrl import load_sae

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "smollm2_sae.py"
FACTS = {
    f"w{i}": {"capital": f"w{i + 10}", "continent": f"w{i % 3 + 30}", "currency": f"w{i % 4 + 34}"}
    for i in range(3, 13)
}
TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m['content'] }} {{ eos_token }}{% endfor %}"
BOS, CONTEXT = 1, 8


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("smollm2_sae", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.smollm2, "PACKAGES", ())
    monkeypatch.setattr(module.smollm2, "load_facts", lambda: FACTS)
    return module


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixteen files of 50 words in folders; file ``i`` has the word ``w{i + 3}`` to itself."""
    generator = torch.Generator().manual_seed(0)
    for i in range(16):
        words = torch.randint(20, VOCABULARY, (50,), generator=generator).tolist()
        words[::2] = [i + 3] * 25
        path = tmp_path / "text" / f"part{i % 2}" / f"{i}{('.md', '.txt', '.rst')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(f"w{word}" for word in words))
    (tmp_path / "text" / "picture.png").write_bytes(b"w3 w4")
    return tmp_path / "text"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def command(tmp_path: Path, texts: Path, model_dir: Path) -> list[str]:
    options = {
        "text": texts,
        "output_dir": tmp_path / "out",
        "model_dir": model_dir,
        "layer": 1,
        "tokens": 500,
        "held_out": 100,
        "chat": 0.2,
        "steps": 60,
        "batch_size": 50,
        "context": CONTEXT,
        "d_sae": 32,
        "k": 4,
        "lr": 0.01,
        "checkpoint_every": 20,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def make_windows(script: ModuleType, command: list[str]) -> tuple[list[Any], list[Any]]:
    options = script.parse(command)
    files = script.find_files(options.text)
    tokenizer = script.smollm2.AutoTokenizer.from_pretrained(options.model_dir)
    return script.make_windows(files, tokenizer, options)


def read_naively(model_dir: Path, windows: list[Any]) -> torch.Tensor:
    """The outputs of layer 1 from the model's hidden states, window by window, without BOS."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        states = [model(w[None], output_hidden_states=True).hidden_states[2] for w in windows]
    return torch.cat([each[0, 1:] for each in states])


def test_windows_hold_the_tokens_asked_for(script: ModuleType, command: list[str]) -> None:
    held_out, windows = make_windows(script, command)
    for found, n in ((held_out, 100), (windows, 500)):
        assert all(window[0] == BOS and 2 <= len(window) <= CONTEXT for window in found)
        assert sum(len(window) - 1 for window in found) == n
    again = make_windows(script, command)
    assert [w.tolist() for w in windows] == [w.tolist() for w in again[1]]
    other = make_windows(script, [*command, "--seed", "1"])
    assert [w.tolist() for w in windows] != [w.tolist() for w in other[1]]


def test_what_is_measured_on_is_not_trained_on(script: ModuleType, command: list[str]) -> None:
    held_out, windows = make_windows(script, [*command, "--chat", "0"])
    own = [{t for w in found for t in w.tolist() if 3 <= t < 19} for found in (held_out, windows)]
    # 50 words a file: 100 held out are two files, 500 to train on are ten others.
    assert list(map(len, own)) == [2, 10]
    assert not own[0] & own[1]
    chats = make_windows(script, [*command, "--chat", "1", "--context", "64"])
    _, unknown = script.smollm2.split_countries(FACTS)
    asked = {f"w{w[i]}" for w in chats[0] for i in range(1, len(w)) if f"w{w[i]}" in unknown}
    assert asked == set(unknown)
    assert not {f"w{token}" for window in chats[1] for token in window} & set(unknown)
    # The template's BOS is not there twice.
    assert all((window[1:] != BOS).all() for found in chats for window in found)


def test_batches_are_the_layer_outputs_without_bos(
    script: ModuleType, command: list[str], model_dir: Path
) -> None:
    _, windows = make_windows(script, command)
    model = script.smollm2.load_base(model_dir)
    expected = read_naively(model_dir, windows)
    # One pool, whole: 500 tokens in batches of 125, so a pass has each of them once.
    found = torch.cat(list(itertools.islice(script.make_batches(model, 1, windows, 125, 0), 4)))
    distances = torch.cdist(found.double(), expected.double())
    assert distances.min(dim=0).values.max() < 1e-4
    assert distances.min(dim=1).values.max() < 1e-4
    assert not torch.allclose(found, expected, atol=1e-2)


def test_skipped_batches_change_nothing_that_follows(
    script: ModuleType, command: list[str], model_dir: Path
) -> None:
    _, windows = make_windows(script, command)
    model = script.smollm2.load_base(model_dir)
    every = list(itertools.islice(script.make_batches(model, 1, windows, 20, 3), 60))
    assert not torch.equal(every[0], every[25])
    for skip in (1, 7, 8, 24, 55):
        first = next(script.make_batches(model, 1, windows, 20, 3, skip=skip))
        torch.testing.assert_close(first, every[skip], rtol=0, atol=0)


def test_an_sae_and_its_figures(
    script: ModuleType, command: list[str], model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    assert script.main(command) == 0
    out = tmp_path / "out"
    sae = load_sae(str(out))
    assert sae.info.hook_name == "blocks.1.hook_resid_post"
    assert (sae.info.architecture, sae.info.d_in, sae.info.d_sae) == ("jumprelu", 16, 32)
    tensors = load_file(out / "sae_weights.safetensors")
    assert {name for name, t in tensors.items() if t.dtype == torch.float16} == {"W_enc", "W_dec"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "model", "text"}

    # What a JumpReLU SAE computes, written out, on the model's own hidden states.
    x = read_naively(model_dir, make_windows(script, command)[0]).double()
    w = {name: tensor.double() for name, tensor in tensors.items()}
    before = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    acts = before * (before > w["threshold"])
    error = (x - acts @ w["W_dec"] - w["b_dec"]).square().sum()
    figures = json.loads((out / "figures.json").read_text())["held_out"]
    assert figures["tokens"] == len(x) == 100
    expected = 1 - error / (x - x.mean(0)).square().sum()
    assert figures["explained_variance"] == pytest.approx(expected.item(), abs=1e-3)
    assert figures["l0"] == pytest.approx((acts > 0).sum().item() / 100, abs=0.02)
    assert figures["dead_share"] == pytest.approx((acts > 0).any(0).logical_not().sum().item() / 32)
    # The threshold has arrived, also in so few steps.
    assert figures["l0"] == pytest.approx(4, abs=1)
    # An SAE of random directions would explain next to nothing.
    assert figures["explained_variance"] > 0.5
    assert '"explained_variance"' in capsys.readouterr().out

    assert script.main(command) == 2
    assert "Choose another `--output_dir`" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(
    script: ModuleType,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    assert script.main(command) == 0
    whole = load_file(tmp_path / "out" / "sae_weights.safetensors")
    again = [*command, "--output_dir", str(tmp_path / "again")]
    make_batches = script.make_batches
    skipped = []

    def stop(*args: Any, skip: int = 0) -> Any:
        skipped.append(skip)
        yield from itertools.islice(make_batches(*args, skip=skip), 50)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(script, "make_batches", stop)
        assert script.main(again) == 130
        assert "goes on from the last checkpoint" in capsys.readouterr().err
    working = tmp_path / ".again.building"
    assert not (tmp_path / "again").exists()
    [checkpoint] = script.find_checkpoints(working)

    assert script.main([*again, "--lr", "0.02"]) == 2
    assert "'lr': (0.01, 0.02)" in capsys.readouterr().err

    def watch(*args: Any, skip: int = 0) -> Any:
        skipped.append(skip)
        return make_batches(*args, skip=skip)

    monkeypatch.setattr(script, "make_batches", watch)
    assert script.main(again) == 0
    # 8 for the norm, and the steps of the checkpoint, of 50 tokens each.
    assert skipped == [0, 8 + int(checkpoint.name.split("-")[1]) // 50]
    assert skipped[1] > 8 + 20
    found = load_file(tmp_path / "again" / "sae_weights.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert not working.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "3"], "Expected a `--layer` from 0 to 2, got 3"),
        (["--tokens", "5000"], "Expected 4,000 tokens for text for training, found 700"),
        (["--batch_size", "501"], "Expected a batch of at most all tokens"),
        (["--text", "nowhere"], r"at nowhere, found no such folder"),
    ],
)
def test_wrong_requests(
    script: ModuleType,
    command: list[str],
    tmp_path: Path,
    capsys: Any,
    options: list[str],
    message: str,
) -> None:
    assert script.main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_text(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"\*\.txt.*found no such file in it.*--text"):
        script.find_files([str(tmp_path)])


def test_missing_packages(
    script: ModuleType, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.smollm2, "PACKAGES", ("no_such_package",))
    with pytest.raises(SystemExit, match="no_such_package cannot be found"):
        script.main(command)
