"""Extras: what messages and pages tell people to install is there to be installed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from peft_fsrl.extras import install_command

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


def test_the_command() -> None:
    # Quoted: in zsh, brackets are a pattern.
    assert install_command("audit") == 'pip install "peft-fsrl[audit]"'


def test_every_extra_that_is_named_exists() -> None:
    sources = {path: path.read_text("utf-8") for path in (ROOT / "peft_fsrl").rglob("*.py")}
    named = {
        extra
        for text in sources.values()
        for extra in re.findall(r"""install_command\(["'](\w+)["']\)""", text)
    }
    assert named == {"app", "audit", "eval", "judge", "plots", "serve"}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        named.update(re.findall(r"peft-fsrl\[(\w+)\]", page.read_text("utf-8")))
    assert named <= set(EXTRAS)


def test_one_place_says_how() -> None:
    pattern = re.compile(r"pip install .?peft-fsrl")
    places = [
        path.name
        for path in (ROOT / "peft_fsrl").rglob("*.py")
        if pattern.search(path.read_text("utf-8"))
    ]
    assert places == ["extras.py"]
