"""Run the notebooks in docs/notebooks top to bottom, and keep what they print.

    python tools/notebooks.py                # all of them; or name some files

What changes from run to run for no reason (times, warnings, progress bars, who ran it) is left out,
so that a diff shows what a change of the code changed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run(path: Path, folder: Path) -> Any:
    """A notebook with the outputs of a run in ``folder``.

    Raises:
        CellExecutionError: a cell has failed.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = nbformat.from_dict(_METADATA)
    resources = {"metadata": {"path": str(folder)}}
    options = {"timeout": 1200, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=resources, **options).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Run and write in place; what they save goes to runs/ in the root."""
    for path in map(Path, sys.argv[1:] or NOTEBOOKS):
        notebook = run(path, ROOT)
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main()
