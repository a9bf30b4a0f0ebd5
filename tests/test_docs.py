"""Runs the Python snippets of README.md and docs/, so that what they show keeps working.

The blocks of a file run in order, in one namespace and one temporary folder. A block that opens
with ```` ```python no-run ```` (it needs the Hub or a GPU) is compiled and not run.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if page.exists()]
# These open with a command, because what they show takes minutes, a download or another library.
OPENS_OTHERWISE = {"inspect", "paper", "real", "serving"}
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<body>.*?)^ *(?P=fence) *$",
    flags=re.MULTILINE | re.DOTALL,
)


class Snippet(NamedTuple):
    """A fenced block of Python: its source, the line it starts on, and whether it is to run."""

    source: str
    line: int
    runs: bool

    def compile(self, page: Path) -> CodeType:
        """Compile so that tracebacks name the page's own line."""
        return compile("\n" * (self.line - 1) + self.source, str(page), "exec", dont_inherit=True)


def find_snippets(text: str) -> list[Snippet]:
    """The Python blocks of a Markdown page, in order."""
    snippets = []
    for match in FENCE.finditer(text):
        language, *options = match["info"].split() or [""]
        if language != "python":
            continue
        unknown = set(options) - {"no-run"}
        assert not unknown, f"unknown option of a python block: {sorted(unknown)}"
        line = text.count("\n", 0, match.start("body")) + 1
        snippets.append(Snippet(textwrap.dedent(match["body"]), line, "no-run" not in options))
    return snippets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_snippets_of(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = find_snippets(page.read_text("utf-8"))
    compiled = [(snippet.runs, snippet.compile(page)) for snippet in snippets]
    monkeypatch.chdir(tmp_path)
    # A real module, because dataclasses and pickle look up the module of what a snippet defines.
    module = ModuleType("snippets")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for runs, code in compiled:
        if runs:
            exec(code, module.__dict__)


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name.removesuffix(".md")
)
def test_a_page_opens_with_what_one_gets_and_a_snippet_that_runs(page: Path) -> None:
    opening = re.split("^## ", page.read_text("utf-8"), flags=re.MULTILINE)[0]
    title, _, rest = opening.partition("\n\n")
    assert title.startswith("# ")
    if page.stem not in OPENS_OTHERWISE:
        assert re.match(r"[A-Z`][^\n]{40}", rest), "words before code"
        assert any(snippet.runs for snippet in find_snippets(opening))


def test_the_architecture_page_lists_the_files() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    [house] = re.findall(r"^## The house\n(.*?)^Lower rooms", page, flags=re.DOTALL | re.MULTILINE)
    listed, parents = set(), [ROOT]
    for indent, name in re.findall(r"^    ((?:  )*)([\w/.]+)", house, flags=re.MULTILINE):
        path = parents[len(indent) // 2] / name
        listed.add(path)
        parents[len(indent) // 2 + 1 :] = [path]
    assert [path for path in listed if not path.exists()] == []
    package = ROOT / "peft_fsrl"
    assert {path.parent for path in package.glob("*/__init__.py")} <= listed
    for folder in (package, package / "sae", package / "tuner"):
        files = {path for path in folder.glob("*.py") if not path.stem.startswith("__")}
        assert files <= listed


def test_find_snippets() -> None:
    text = textwrap.dedent(
        """\
        ```python
        a = 1
        ```
        ````markdown
        ```python
        not_ours = 1
        ```
        ````
        - an item
          ```python no-run
          b = 2
          ```
        ```bash
        make demo
        ```
        """
    )
    assert find_snippets(text) == [
        Snippet("a = 1\n", line=2, runs=True),
        Snippet("b = 2\n", line=11, runs=False),
    ]


def test_unknown_option_is_an_error() -> None:
    with pytest.raises(AssertionError, match="norun"):
        find_snippets("```python norun\n```\n")
