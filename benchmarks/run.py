"""Run the benchmarks, and put their tables into docs/performance.md.

    python benchmarks/run.py [--only operation ...] [--update-docs] [any option of theirs]

Each runs in a process of its own and leaves `benchmarks/results/<name>.json`. `--update-docs` fills
the page from these files, between the marks that bear their names; with `--no-run` from those that
are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common import RESULTS, render_record

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
NAMES = ("operation", "generation", "whole_model", "startup")


def fill_page(page: str, results: Path = RESULTS) -> str:
    """The page with the tables of every record that exists."""
    for name in NAMES:
        record = results / f"{name}.json"
        if record.is_file():
            text = render_record(json.loads(record.read_text("utf-8")))
            before, start, rest = page.partition(f"<!-- {name} -->")
            _, end, after = rest.partition(f"<!-- /{name} -->")
            if not end:
                raise ValueError(f"Expected marks of {name} in the page, found none.")
            page = f"{before}{start}\n\n{text}\n{end}{after}"
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and fill in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--update-docs", action="store_true")
    found, theirs = parser.parse_known_args(arguments)
    for name in () if found.no_run else found.only:
        print(f"\n## {name}\n", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{name}.py"), *theirs], check=True)
    if found.update_docs:
        PAGE.write_text(fill_page(PAGE.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
