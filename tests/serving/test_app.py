"""The app in a real browser: what it shows is what a conversation with the model gives."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_tokenizer
from peft_fsrl.analysis.generations import SteeredToken
from peft_fsrl.analysis.labels import FeatureLabel, Labels, load_labels, save_labels
from peft_fsrl.cli.main import main
from peft_fsrl.serving.chat import Chat
from serving_helpers import load_reference, save_adapter, save_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TOKEN = ".token .text"
HOSTILE = "<img src=x onerror=alert(1)>"
N_LABELED = 48


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the command is given: an adapter, its base, labels of half of its features."""
    folder = tmp_path_factory.mktemp("saved")
    model = save_model(folder / "model")
    labels = Labels(
        "test",
        ("style", "empty"),
        96,
        None,
        tuple(FeatureLabel(i, f"{HOSTILE} {i}", ("style",), None) for i in range(N_LABELED)),
    )
    save_labels(labels, folder / "labels.json")
    adapter = save_adapter(folder / "adapter", model)
    return [str(adapter), "--base-model", str(model), "--labels", str(folder / "labels.json")]


def expect(
    saved: list[str], *texts: str, before: float = 1.0, strength: float = 1.0, **scales: float
) -> list[SteeredToken]:
    """The last answer of a conversation of its own, steered as asked; the others ``before``."""
    adapter, _, model, _, labels = saved
    chat = Chat(
        load_reference(Path(model), Path(adapter)),
        tiny_tokenizer(),
        load_labels(labels),
        max_new_tokens=8,
        n_features=12,
    )
    pieces: list[SteeredToken] = []
    for text in texts:
        pieces.clear()
        chat.command(f"/strength {strength if text is texts[-1] else before}")
        chat.scales = scales if text is texts[-1] else {}
        chat.say(text, pieces.append)
    return pieces


class Page:
    """The page as somebody uses it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.said = page, []
        page.set_default_timeout(60_000)
        page.on("console", lambda m: m.type == "error" and self.said.append(m.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: self.said.append(dialog.message))
        page.on("request", lambda r: r.url.startswith((url, "data:")) or self.said.append(r.url))
        page.goto(url)
        self.panels = [page.locator(".said").nth(number) for number in range(2)]

    def ask(self, text: str, *answers: list[SteeredToken]) -> None:
        """Send a message, and wait for an answer of the base model and one of the trained."""
        before = [panel.locator(TOKEN).count() for panel in self.panels]
        self.page.get_by_label("Message").fill(text)
        self.page.get_by_role("button", name="Send").click()
        for panel, n, answer in zip(self.panels, before, answers, strict=True):
            panel.locator(TOKEN).nth(n + len(answer)).wait_for()

    def set(self, name: str, value: float) -> None:
        self.page.get_by_label(f"number input for {name}").fill(str(value))
        self.page.get_by_label(f"number input for {name}").press("Enter")

    def tokens(self, number: int) -> list[str]:
        return [str(text) for text in self.panels[number].locator(TOKEN).all_text_contents()]

    def shades(self, number: int) -> list[float]:
        """Opacity of each token's tint, from 0 to 1."""
        styles = (
            self.panels[number]
            .locator(TOKEN)
            .evaluate_all("tokens => tokens.map(token => getComputedStyle(token).backgroundColor)")
        )
        colors = [re.findall(r"[\d.]+", style) for style in styles]
        return [float(color[3]) if len(color) == 4 else 1.0 for color in colors]

    def features(self, number: int, place: int, n: int) -> list[tuple[int, float, str, str]]:
        """The table of ``n`` rows after a click on a token."""
        self.panels[number].locator(TOKEN).nth(place).click()
        self.page.wait_for_function(
            "n => [...document.querySelectorAll('[role=gridcell][data-col=\"0\"]')]"
            ".filter(cell => cell.innerText.trim()).length === n",
            arg=n,
        )
        cells = self.page.locator("[role=gridcell]").evaluate_all(
            "cells => cells.map(cell => [Number(cell.dataset.row), cell.innerText.trim()])"
        )
        rows = [[text for row, text in cells if row == place] for place in range(n)]
        return [(int(feature), float(v), *words) for feature, v, *words in rows]


@pytest.fixture(scope="module")
def url(saved: list[str]) -> Iterator[str]:
    pytest.importorskip("gradio")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    options = ["--max-new-tokens", "8", "--device", "cpu", "--port", port]
    app = subprocess.Popen([sys.executable, "-m", "peft_fsrl", "app", *saved, *options])
    address = f"http://127.0.0.1:{port}/"
    while app.poll() is None:
        try:
            urllib.request.urlopen(address).close()
            break
        except OSError:
            time.sleep(0.2)
    assert app.poll() is None
    yield address
    app.terminate()
    app.wait()


@pytest.fixture
def pages(url: str) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    from playwright.sync_api import sync_playwright

    opened: list[Page] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_page() -> Page:
            opened.append(Page(browser.new_context().new_page(), url))
            return opened[-1]

        yield open_page
        browser.close()
    for page in opened:
        assert page.said == []


@pytest.mark.slow
def test_a_conversation_in_a_browser(saved: list[str], pages: Any, tmp_path: Path) -> None:
    page = pages()
    pieces, plain = expect(saved, "w5 w7"), expect(saved, "w5 w7", strength=0.0)
    assert [piece.text for piece in pieces] != [piece.text for piece in plain]
    page.ask("w5 w7", plain, pieces)
    question = "> w5 w7\n\n"
    assert page.tokens(0) == [question, *(piece.text for piece in plain)]
    assert page.tokens(1) == [question, *(piece.text for piece in pieces)]

    # Tinted by the mass of the features that are shown, the most steered token fully.
    sizes = [0.0, *(sum(abs(each.value) for each in piece.steered) for piece in pieces)]
    shares = [size / max(sizes) for size in sizes]
    assert page.shades(1) == pytest.approx(shares, abs=0.02)
    assert not any(page.shades(0))

    rows = page.features(1, 3, len(pieces[2].steered))
    assert [row[:2] for row in rows] == [
        (each.feature, pytest.approx(each.value, abs=1e-4)) for each in pieces[2].steered
    ]
    kinds = {row[0]: row[2:] for row in rows}
    assert kinds == {f: ("style", f"{HOSTILE} {f}") if f < N_LABELED else ("", "") for f in kinds}
    assert any(f < N_LABELED for f in kinds)
    assert any(f >= N_LABELED for f in kinds)
    assert page.features(0, 3, 0) == []

    # The next answer: what was said stays, and the sliders count.
    first = len(page.tokens(1))
    page.set("style", -1)
    page.set("Strength (0 = base, 1 = as trained)", 2)
    changed = expect(saved, "w5 w7", "w9", strength=2.0, style=-1.0)
    page.ask("w9", expect(saved, "w5 w7", "w9", before=0.0, strength=0.0), changed)
    assert page.tokens(1)[first:] == ["\n\n> w9\n\n", *(piece.text for piece in changed)]
    assert [row[:2] for row in page.features(1, first + 2, len(changed[1].steered))] == [
        (each.feature, pytest.approx(each.value, abs=1e-4)) for each in changed[1].steered
    ]

    # Somebody else has a conversation of their own.
    other = pages()
    other.ask("w5 w7", plain, pieces)
    assert other.tokens(1) == [question, *(piece.text for piece in pieces)]

    page.page.screenshot(path=tmp_path / "app.png", full_page=True)
    page.page.get_by_role("button", name="Clear").click()
    page.panels[1].locator(TOKEN).first.wait_for(state="detached")
    page.ask("w5 w7", plain, expect(saved, "w5 w7", strength=2.0, style=-1.0))
    assert page.tokens(0) == [question, *(piece.text for piece in plain)]


def test_the_command_starts_it(saved: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    from peft_fsrl.serving import app

    started: list[Any] = []
    monkeypatch.setattr(app, "run_app", lambda *given: started.append(given))
    assert main(["app", *saved, "--port", "81", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    [(make_chat, host, port)] = started
    assert (host, port) == ("127.0.0.1", 81)
    pieces: list[SteeredToken] = []
    make_chat().say("w5 w7", pieces.append)
    assert 0 < len(pieces) <= 3
    assert len(pieces[0].steered) > 1
    assert make_chat().messages == []
    assert list(make_chat().categories) == ["style", "empty"]


def test_without_gradio_it_says_how_to_install_it(
    saved: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "peft_fsrl.serving.app", raising=False)
    assert main(["app", *saved]) == 2
    assert 'pip install "peft-fsrl[app]"' in capsys.readouterr().err
