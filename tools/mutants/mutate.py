"""Break a copy of the package in known ways, and see that the tests notice each.

Prints a row for each mutant and exits with 1 if one survives.

    python tools/mutants/mutate.py [--only WORDS] [--list]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
# The package, its tests, and all that tests import or read.
_COPIED = (
    *("peft_fsrl", "tests", "tools", "examples", "benchmarks", "docs"),
    *("pyproject.toml", "README.md", "CHANGELOG.md"),
)
_TESTS_FAILED = 1
_COULD_NOT_RUN = 99


def preload() -> None:
    """Import what is slow and not ours, once for every mutant."""
    # As in tests/conftest.py, which comes too late for libraries that are already there.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
    os.environ.update(TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", WANDB_MODE="disabled")
    import warnings

    warnings.simplefilter("ignore")
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import sae_lens  # noqa: F401
    import torch
    import transformers  # noqa: F401

    # Processes are forked below, and threads are not.
    torch.set_num_threads(1)


def copy_project(folder: Path) -> None:
    """The package and its tests, to be changed."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)


def run_tests(folder: Path, tests: Sequence[str], output: Path) -> int:
    """The exit status of pytest on some tests of a copy, in a process of its own."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    status = _COULD_NOT_RUN
    try:
        status = _run_pytest(folder, tests, output)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not the way of an exception: what is to be cleaned up is the parent's.
        os._exit(status)


def _run_pytest(folder: Path, tests: Sequence[str], output: Path) -> int:
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    # For processes that the tests start, too.
    os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    sys.dont_write_bytecode = True
    import pytest

    names = [f"tests/{name}" for name in tests]
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    # What was imported early cannot have its assertions rewritten, and need not.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = int(pytest.main([*options, *names]))
    found = sys.modules["peft_fsrl"].__file__ or ""
    return status if Path(found).is_relative_to(folder) else _COULD_NOT_RUN


def judge(mutant: Mutant, folder: Path, output: Path) -> str:
    """Apply a mutant, run its tests, and take it back: ``killed``, or what happened instead."""
    path = folder / "peft_fsrl" / mutant.file
    original = path.read_text("utf-8")
    if original.count(mutant.old) != 1:
        return f"does not apply: its text occurs {original.count(mutant.old)} times"
    path.write_text(original.replace(mutant.old, mutant.new), "utf-8")
    try:
        status = run_tests(folder, mutant.tests, output)
    finally:
        path.write_text(original, "utf-8")
    if status == _TESTS_FAILED:
        return "killed"
    return "SURVIVED" if status == 0 else f"pytest stopped with status {status}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants, or those whose name or file contains the words given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="run the mutants whose name or file has this")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if options.only in m.name or options.only in m.file]
    width = max((len(mutant.name) for mutant in chosen), default=0)
    files = max((len(mutant.file) for mutant in chosen), default=0)
    if options.list:
        for mutant in chosen:
            print(f"{mutant.file:{files}} {mutant.name}")
        return 0
    preload()
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        # The real path: a test compares it with where the package was found.
        folder = Path(temporary).resolve() / "project"
        folder.mkdir()
        output = folder.parent / "output"
        copy_project(folder)
        every = sorted({test for mutant in chosen for test in mutant.tests})
        if run_tests(folder, every, output) != 0:
            print(output.read_text("utf-8", "replace"))
            print("These tests fail before anything is changed.")
            return 1
        for mutant in chosen:
            start = time.perf_counter()
            verdict = judge(mutant, folder, output)
            seconds = time.perf_counter() - start
            place = f"{mutant.file:{files}} {mutant.name:{width}}"
            print(f"{place} {verdict} ({seconds:.0f} s)", flush=True)
            failures += verdict != "killed"
    print(f"{len(chosen) - failures} of {len(chosen)} mutants were killed.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
