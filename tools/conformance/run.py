"""Run PEFT's own tests on FSRL: fetch them, run them, and judge every skip.

    .venv/bin/python tools/conformance/run.py [pytest arguments, for example -k save_pretrained]

The tests come from the source distribution of the installed version of PEFT and stay, with the few
packages that they import, in .cache/. Exits with 0 if no test failed, every skip is on the list in
allowed_skips.py, every entry of that list was needed (asked only without arguments), and every row
of cases.py found its place.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from allowed_skips import ALLOWED, AllowedSkip

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGE = "peft_tests"
FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
)

Tests = dict[str, dict[str, Any]]


def fetch_tests(version: str) -> Path:
    """Fetch PEFT's tests once and return the folder that holds them as a package."""
    cache = ROOT / ".cache"
    folder = cache / f"peft-{version}"
    if (folder / PACKAGE / "__init__.py").exists():
        return folder
    cache.mkdir(exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    print(f"Fetching the source distribution of peft {version} ...", flush=True)
    with tempfile.TemporaryDirectory() as download:
        options = ["--no-binary", "peft", "--no-deps", "--dest", download]
        pip("download", *options, f"peft=={version}")
        [archive] = Path(download).glob("peft-*.tar.gz")
        extract_tests(archive, folder / PACKAGE)
    # Written last: without it, the folder is taken for half-filled.
    (folder / PACKAGE / "__init__.py").touch()
    return folder


def extract_tests(archive: Path, target: Path) -> None:
    """Copy the Python files of the archive's ``tests/`` into ``target``, and nothing else."""
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            match = re.fullmatch(r"[^/]+/tests/(\w+\.py)", member.name)
            content = tar.extractfile(member) if match and member.isfile() else None
            if match and content:
                (target / match[1]).write_bytes(content.read())


def fetch_imports(folder: Path) -> Path:
    """Install what only PEFT's tests import, outside the environment, once per list."""
    wanted = (HERE / "requirements.txt").read_text()
    site = folder / "site"
    stamp = site / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        print("Installing what PEFT's tests import ...", flush=True)
        options = ["--upgrade", "--no-deps", "--target", site]
        pip("install", *options, "-r", HERE / "requirements.txt")
        stamp.write_text(wanted)
    return site


def pip(*args: object) -> None:
    """Run pip, or exit with its status."""
    words = [sys.executable, "-m", "pip", args[0], "-qq", *args[1:]]
    status = subprocess.call([str(word) for word in words])
    if status:
        sys.exit(status)


def run_tests(folder: Path, site: Path, args: list[str]) -> tuple[Tests, list[str]]:
    """Run the tests in an empty folder, which the plugin fills with tiny models.

    Returns:
        What became of each test, and the rows of ours for which PEFT has no place any more.
    """
    with tempfile.TemporaryDirectory() as work:
        outcomes = Path(work, "outcomes.json")
        path = [str(ROOT), str(HERE), str(folder), str(site), os.environ.get("PYTHONPATH", "")]
        env = {
            # On tensors this small a second thread costs more than it does.
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            **os.environ,
            "CONFORMANCE_OUTCOMES": str(outcomes),
            # The tests that are left need nothing from the Hub, and must not wait for it.
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini")]
        command += ["--rootdir", str(folder), "-p", "plugin", "--basetemp", str(Path(work, "tmp"))]
        command += [str(folder / PACKAGE / name) for name in FILES]
        status = subprocess.call([*command, *args], cwd=work, env=env)
        # 0 and 1: the tests ran. Anything else: they did not, or not to the end.
        if status not in (0, 1) or not outcomes.exists():
            sys.exit(status or 1)
        found = json.loads(outcomes.read_text())
        return found["tests"], found["unused_rows"]


def report(tests: Tests, whole: bool) -> list[str]:
    """Print the counts and return what is wrong, one line each."""
    groups: Counter[str] = Counter()
    used: set[AllowedSkip] = set()
    wrong = []
    for test, found in tests.items():
        line = f"{found['outcome']}: {test.removeprefix(PACKAGE + '/')}: {found['reason'][:160]}"
        entries = [entry for entry in ALLOWED if entry.allows(test, found["reason"])]
        if found["outcome"] == "skipped" and entries:
            used.add(entries[0])
            groups.update([entries[0].group])
        elif found["outcome"] != "passed":
            wrong.append(line)
    if whole:
        wrong += [f"allows nothing: {entry}" for entry in ALLOWED if entry not in used]
    if not tests:
        wrong.append("no test ran")
    print_counts(tests)
    print("\nSkipped:")
    for group, count in groups.most_common():
        print(f"{count:6}  {group}")
    return wrong


def print_counts(tests: Tests) -> None:
    """Print a table: one line per test file and one for all."""
    files = sorted({test.partition("::")[0] for test in tests})
    print(f"\n{'file':44}{'applied':>9}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for prefix in [*files, ""]:
        found = [value for test, value in tests.items() if test.startswith(prefix)]
        counts = Counter(value["outcome"] for value in found)
        row = [len(found), counts["passed"], counts["failed"], counts["skipped"]]
        seconds = round(sum(value["seconds"] for value in found))
        name = prefix.removeprefix(PACKAGE + "/") or "all"
        print("{:44}{:9}{:8}{:8}{:9}{:9}".format(name, *row, seconds))


def main() -> None:
    """Fetch, run, report."""
    args = sys.argv[1:]
    version = metadata.version("peft")
    folder = fetch_tests(version)
    site = fetch_imports(folder)
    start = time.monotonic()
    tests, unused_rows = run_tests(folder, site, args)
    wrong = report(tests, whole=not args)
    wrong += [f"no such list or test in PEFT's tests: {row}" for row in unused_rows]
    print(f"\npeft {version}, {time.monotonic() - start:.0f} seconds")
    for line in wrong:
        print(line)
    print("Conforms." if not wrong else f"Does not conform: {len(wrong)} findings.")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
