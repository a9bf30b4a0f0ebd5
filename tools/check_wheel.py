"""Run README's example and the program from the built wheel, installed.

    python tools/check_wheel.py dist

The wheel is installed into a new environment, which borrows the libraries of the environment that
runs this file, but not the checkout of the package in it: what is imported is what was built.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
CHECK = """
from importlib import metadata
from pathlib import Path

assert Path(peft_fsrl.__file__).is_relative_to({home!r}), peft_fsrl.__file__
assert peft_fsrl.__version__ == metadata.version("peft-fsrl"), metadata.version("peft-fsrl")
"""


def tracked() -> set[str]:
    """The package's files, as the repository has them."""
    listed = subprocess.run(
        ["git", "ls-files", "peft_fsrl"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(listed.stdout.split())


def compare(wheel: Path) -> None:
    """Exit if the wheel has other files of the package than the repository."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("peft_fsrl/")}
    if names != tracked():
        sys.exit(
            f"Expected the package's files in {wheel.name}. Missing: {sorted(tracked() - names)}; "
            f"too many: {sorted(names - tracked())}. See [tool.setuptools] in pyproject.toml."
        )


def run(*command: object, home: Path) -> None:
    """Run a command outside the repository, without a network; exit with its status if it fails."""
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HOME": str(home), "HF_HUB_OFFLINE": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=home, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}With the wheel, this failed: {' '.join(words)}")


def main() -> None:
    """Install the wheel and use it."""
    [wheel] = (ROOT / sys.argv[1]).glob("*.whl")
    compare(wheel)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        scripts = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
        venv.create(home / "venv")
        python = scripts / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-qq"]
        run(*pip, "--no-index", "--no-deps", wheel, home=home)
        # A line of a .pth file is a folder to search last; what *its* .pth files add is left out.
        site = sysconfig.get_path("purelib", vars={"base": str(home / "venv")})
        Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        [example] = EXAMPLE.findall((ROOT / "README.md").read_text("utf-8"))
        (home / "example.py").write_text(
            f"import peft_fsrl\n{CHECK.format(home=str(home))}\n{example}", "utf-8"
        )
        run(python, "example.py", home=home)
        run(scripts / "peft-fsrl", "--help", home=home)
    print(f"{wheel.name}: README's example runs where only the wheel is installed.")


if __name__ == "__main__":
    main()
