"""Create or refresh the virtual environment: pinned dependencies and this package, editable.

    python3 tools/setup_venv.py --venv .venv --constraints constraints.txt

While the environment matches the files it was built from, nothing is done and no network is needed.
One that was left half-built, or whose folder was moved, is built anew. The syntax is old enough for
any Python 3 to read, so that one that is too old gets an answer and not a traceback.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)


def create(venv: Path) -> None:
    """Create an empty environment, in place of what was there."""
    if sys.version_info < OLDEST:
        sys.exit(
            "peft_fsrl needs Python {}.{} or newer, but {} is {}.{}. Name a newer one: "
            "make PYTHON=python3.11 ...".format(*OLDEST, sys.executable, *sys.version_info[:2])
        )
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        sys.exit(f"{venv} is no virtual environment. Remove it, or name another with VENV=...")
    run(sys.executable, "-m", "venv", "--clear", venv)


def run(*command: object, **env: str) -> None:
    """Run a command in the repository; exit with its status if it fails."""
    words = [str(word) for word in command]
    status = subprocess.call(words, cwd=str(ROOT), env={**os.environ, **env})
    if status:
        sys.exit(status)


def install(python: Path, venv: Path, constraints: Path, torch_spec: str) -> None:
    """Install torch, then the package with its extras, under the constraints."""
    print(f"Installing into {venv} what {constraints.name} names: a few minutes ...", flush=True)
    pins = constraints.read_text()
    torch_pin = re.search(r"^torch==([\w.]+)", pins, flags=re.MULTILINE)
    if torch_pin is None:
        sys.exit(f"{constraints} must pin torch: a line torch==X.Y.Z.")
    run(python, "-m", "pip", "install", "-qq", "pip>=23")
    run(python, ROOT / "tools" / "install_torch.py", torch_pin.group(1), TORCH_SPEC=torch_spec)
    if torch_spec:
        # The pin would undo a torch that was chosen by hand.
        pins = pins.replace(torch_pin.group(0), "")
    used = venv / "constraints.txt"
    used.write_text(pins)
    run(
        python, "-m", "pip", "install", "-qq", "-c", used, "-e", ".[app,audit,dev,eval,judge,sweep]"
    )


def main() -> None:
    """Bring the environment up to date if it is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--constraints", default="constraints.txt")
    args = parser.parse_args()
    venv, constraints = ROOT / args.venv, ROOT / args.constraints
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    # Written last and removed first: without it, the environment is taken for half-built.
    stamp = venv / "stamp.json"
    built = json.loads(stamp.read_text()) if stamp.exists() else {}
    inputs = (ROOT / "pyproject.toml").read_bytes() + constraints.read_bytes()
    wanted = {
        "root": str(ROOT),
        "inputs": hashlib.sha256(inputs).hexdigest(),
        "torch_spec": os.environ.get("TORCH_SPEC", built.get("torch_spec", "")),
    }
    if built.get("root") != wanted["root"] or not python.exists():
        create(venv)
    elif built == wanted:
        return
    else:
        stamp.unlink()
    install(python, venv, constraints, wanted["torch_spec"])
    stamp.write_text(json.dumps(wanted, indent=2) + "\n")


if __name__ == "__main__":
    main()
