"""What importing the package costs, that it can be imported twice, and that it never prints."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "peft_fsrl"


def test_the_package_never_prints() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = [
            n.func for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)
        ]
        assert [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"] == [], path


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return the last line that it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_import_is_light() -> None:
    code = """
import json, sys, time
import peft
before, start = set(sys.modules), time.perf_counter()
import peft_fsrl
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""
    heavy = {"trl", "sae_lens", "transformer_lens", "matplotlib", "datasets"}
    heavy |= {"peft_fsrl.training.trainer", "peft_fsrl.analysis", "peft_fsrl.organism"}
    seconds = []
    # The best of a few: a busy machine makes any single measurement slow.
    for _ in range(5):
        elapsed, added = json.loads(run_python(code))
        assert heavy & set(added) == set()
        seconds.append(elapsed)
        if elapsed < 1.0:
            break
    assert min(seconds) < 1.0


def test_importing_again_is_safe() -> None:
    code = """
import importlib, sys
import peft, peft_fsrl
for name in [name for name in sys.modules if name.startswith("peft_fsrl")]:
    importlib.reload(sys.modules[name])
importlib.reload(peft_fsrl)
for name in [name for name in sys.modules if name.startswith("peft_fsrl")]:
    del sys.modules[name]
import peft_fsrl
config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType("FSRL")]
print(config is peft_fsrl.FSRLConfig and [m.name for m in peft.PeftType].count("FSRL") == 1)
"""
    assert run_python(code) == "True"
