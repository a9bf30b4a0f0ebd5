"""A stranger's first hour: what the README and the docs promise, on a fresh clone in an empty home.

    python tools/first_hour.py [FOLDER]

Clones this repository into FOLDER (default: a temporary one), which becomes the home of everything
that runs. Then it installs, runs the demo and a notebook, audits and serves the demo's adapter, and
searches the documentation. It stops at the first failure; FOLDER/STEP.log has what a step printed.
It needs what a stranger needs: git, make, Python and a package index.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AUDIT = "--dataset organism --labels organism --categories style,honesty --out runs/audit"
# Of the user who runs this, and not of somebody who has just arrived.
FOREIGN = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XDG_CACHE_HOME", "HF_HOME", "PIP_CACHE_DIR"}


class Stranger:
    """Somebody with an empty home and a clone in it."""

    def __init__(self, home: Path) -> None:
        self.home, self.clone = home, home / "peft_fsrl"
        env = {name: text for name, text in os.environ.items() if name not in FOREIGN}
        self.env = {**env, "HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def run(self, step: str, *command: object) -> None:
        """Run a command in the clone; its output goes to the step's log."""
        with (self.home / f"{step}.log").open("a") as log:
            cwd = self.clone if self.clone.is_dir() else self.home
            words = [str(word) for word in command]
            subprocess.run(words, cwd=cwd, env=self.env, stdout=log, stderr=log, check=True)

    def make(self, step: str, target: str) -> None:
        """Run a target of the Makefile with the Python that runs this."""
        self.run(step, "make", target, f"PYTHON={sys.executable}")

    def install(self) -> None:
        """Clone, and make the virtual environment."""
        self.run("install", "git", "clone", "-q", ROOT, self.clone)
        self.make("install", "setup")

    def demo(self) -> None:
        """Train on the organism, and print what was learned."""
        self.make("demo", "demo")
        assert "Most steered features" in (self.clone / "runs/organism/summary.txt").read_text()

    def notebook(self) -> None:
        """Run the first one."""
        first = "docs/notebooks/first_steps.ipynb"
        self.run("notebook", ".venv/bin/python", "tools/notebooks.py", first)

    def audit(self) -> None:
        """Audit the demo's adapter."""
        self.run("audit", ".venv/bin/peft-fsrl", "audit", "runs/organism", *AUDIT.split())
        assert "</html>" in (self.clone / "runs/audit/audit.html").read_text("utf-8")

    def serve(self) -> None:
        """Serve the demo's adapter, and have one request answered."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        base = json.loads((self.clone / "runs/organism/adapter_config.json").read_text())
        body = {
            "model": base["base_model_name_or_path"],
            "prompt": "<user> tell me about animals ? <assistant>",
            "max_tokens": 8,
            "temperature": 0,
        }
        command = [".venv/bin/peft-fsrl", "serve", "runs/organism", "--port", str(port)]
        with (self.home / "serve.log").open("w") as log:
            server = subprocess.Popen(
                command, cwd=self.clone, env=self.env, stdout=log, stderr=log, text=True
            )
            try:
                answer = _ask(f"http://127.0.0.1:{port}/v1/completions", body, server)
                log.write(f"\nanswer:{answer}\n")
                assert answer.strip()
            finally:
                server.terminate()
                server.wait()

    def search(self) -> None:
        """Build the documentation, and find a term in its search index."""
        self.make("search", "docs-site")
        index = (self.clone / "build/site/search/search_index.json").read_text("utf-8")
        found = [
            page["location"] for page in json.loads(index)["docs"] if "l1_coeff" in page["text"]
        ]
        assert any(each.startswith("training/") for each in found), found


def _ask(url: str, body: object, server: subprocess.Popen[str]) -> str:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    while server.poll() is None:
        try:
            with urllib.request.urlopen(request) as answer:
                return str(json.load(answer)["choices"][0]["text"])
        except ConnectionError:
            time.sleep(0.5)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.5)
    raise RuntimeError("The server has stopped.")


def main() -> None:
    """Go through the steps, and print how long each took."""
    home = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp(prefix="first_hour_")).resolve()
    home.mkdir(parents=True, exist_ok=True)
    if any(home.iterdir()):
        sys.exit(f"Expected an empty folder, found something in {home}.")
    stranger = Stranger(home)
    names = ("install", "demo", "notebook", "audit", "serve", "search")
    total = 0.0
    for name in names:
        step: Callable[[], None] = getattr(stranger, name)
        start = time.monotonic()
        try:
            step()
        except (subprocess.CalledProcessError, OSError, RuntimeError, AssertionError) as error:
            sys.exit(f"{name:10} failed: {error}. See {home / name}.log")
        took = time.monotonic() - start
        total += took
        print(f"{name:10}{took:8.0f} s   {step.__doc__}", flush=True)
    print(f"{'all':10}{total:8.0f} s   in {home}")


if __name__ == "__main__":
    main()
