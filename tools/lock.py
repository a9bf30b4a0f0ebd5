"""Write constraints.txt: what is installed here, and what fits it on other Pythons and platforms.

    .venv/bin/python tools/lock.py

Needs uv, which it installs. Every release in this environment is pinned for this Python and newer
ones; uv resolves what older Pythons get instead and what only other platforms need. Packages that
torch's CUDA build alone asks for are left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("app", "audit", "dev", "eval", "judge", "plots", "sweep")
CUDA_ONLY = re.compile(r"^(nvidia-|cuda-|triton\b)")
HEADER = """\
# The releases the project is tested with, on Python {python}; other Pythons get releases
# that support them. Written by tools/lock.py (`make lock`): do not edit by hand.
"""


def main() -> None:
    """Resolve for every supported Python and write the file."""
    python = "{}.{}".format(*sys.version_info[:2])
    pins = "".join(
        f"{dist.name}=={dist.version.partition('+')[0]} ; python_version >= '{python}'\n"
        for dist in metadata.distributions()
        if dist.name not in {"peft-fsrl", "pip", "uv"}
    )
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "uv"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        known, resolved = Path(folder, "known.txt"), Path(folder, "resolved.txt")
        known.write_text(pins)
        uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header"]
        uv += ["--universal", "--python-version", "3.11", "--no-python-downloads", "--no-annotate"]
        files = ["--constraints", str(known), "--output-file", str(resolved), "pyproject.toml"]
        extras = [part for name in EXTRAS for part in ("--extra", name)]
        subprocess.run([*uv, *extras, *files], check=True, cwd=ROOT)
        lines = resolved.read_text().splitlines()
    kept = [line for line in lines if not CUDA_ONLY.match(line)]
    text = HEADER.format(python=python) + "\n".join(kept) + "\n"
    (ROOT / "constraints.txt").write_text(text)


if __name__ == "__main__":
    main()
