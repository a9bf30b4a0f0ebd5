"""What the documentation site has beyond docs/: the repository's own pages, notebooks, the API.

Pages are read as they are on GitHub, so links are brought to where the site has their targets. What
the site does not have (sources, examples) becomes a name.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent.parent
# Repository file -> page of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
}
REFERENCE = {
    "core": "peft_fsrl",
    "training": "peft_fsrl.training",
    "analysis": "peft_fsrl.analysis",
    "labels": "peft_fsrl.analysis.labels",
    "data": "peft_fsrl.analysis.data",
    "audit": "peft_fsrl.analysis.audit",
    "equivalence": "peft_fsrl.equivalence",
    "organism": "peft_fsrl.organism",
    "functional": "peft_fsrl.functional",
}
_LINK = re.compile(r"(?<!`)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that do not lie in docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
    for notebook in sorted(ROOT.glob("docs/notebooks/*.ipynb")):
        name = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, name, content=render_notebook(notebook)))
    for name, module in REFERENCE.items():
        text = f"# `{module}`\n\n::: {module}\n    options:\n      show_root_toc_entry: false\n"
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def render_notebook(path: Path) -> str:
    """A notebook as Markdown: its texts, its code, what it printed, and the file itself."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        printed = "".join("".join(each.get("text", "")) for each in cell.get("outputs", ()))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    parts.insert(1, f'<a href="../{path.name}" download>The notebook</a>, to run it yourself.')
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to the site's pages, and fences that Python-Markdown can read."""
    source = page.file.src_uri
    folder = "" if source in PAGES.values() else posixpath.dirname(f"docs/{source}")
    if source.startswith("reference/"):
        return markdown

    def move(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, hash_, anchor = target.partition("#")
        if ":" in target or not path:
            return link.group()
        there = posixpath.normpath(posixpath.join(folder, path))
        if there in PAGES or there.startswith("docs/"):
            target = PAGES.get(there) or there.removeprefix("docs/")
            target = re.sub(r"\.ipynb$", ".md", target)
            target = posixpath.relpath(target, posixpath.dirname(source) or ".")
            return f"[{text}]({target}{hash_}{anchor})"
        if not (ROOT / there).exists():
            return link.group()  # and --strict says so
        return text if there in text else f"{text} (`{there}`)"

    return _LINK.sub(move, markdown).replace("```python no-run", "```python")
