"""Install torch into the environment that runs this file, without CUDA where no GPU is present.

On Linux the default torch of the Python package index brings several gigabytes of CUDA libraries.
A machine without an NVIDIA GPU gets the CPU build instead: from pip if the configured index has
it, else through uv, which knows where PyTorch publishes it. Set TORCH_SPEC to pip's arguments to
decide for yourself, for example TORCH_SPEC="torch==2.13.0".

    python tools/install_torch.py 2.13.0
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ADVICE = """\
No CPU build of torch {version} could be installed. Tried, in this order:
  pip install torch=={version}+cpu
  uv pip install --torch-backend=cpu torch=={version}
The last answer stands above. Ways to go on:
  - check that this machine reaches its package index, and run the same command again;
  - set TORCH_SPEC to whatever pip should install instead, and run the same command again:
      TORCH_SPEC="torch=={version}"          the default build, with gigabytes of CUDA libraries
      TORCH_SPEC="/path/to/torch-{version}-....whl"    a wheel that you have
      TORCH_SPEC="torch --index-url URL"     an index that has a build for this machine
"""


def succeeds(*command: str, quiet: bool = False) -> bool:
    """Run a command; True if it exits with zero."""
    return subprocess.run(command, capture_output=quiet).returncode == 0


def pip(*args: str, quiet: bool = False) -> bool:
    """Run pip install in this environment; True if it succeeded."""
    return succeeds(sys.executable, "-m", "pip", "install", "-qq", *args, quiet=quiet)


def install_cpu(version: str) -> bool:
    """Install the CPU build with pip or else with uv; True if it succeeded."""
    if pip(f"torch=={version}+cpu", quiet=True):
        return True
    print("pip finds no CPU build of torch, trying uv ...", flush=True)
    uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    return pip("uv") and succeeds(*uv, "--torch-backend=cpu", f"torch=={version}")


def has_nvidia_gpu() -> bool:
    """True if NVIDIA's driver is loaded and answers."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and succeeds(smi, "-L", quiet=True)


def is_installed(version: str) -> bool:
    """True if that release of torch, of whatever build, is installed and can be imported."""
    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
    if installed.partition("+")[0] != version:
        return False
    return succeeds(sys.executable, "-c", "import torch", quiet=True)


def install(version: str, spec: str) -> bool:
    """Install torch by ``spec`` if it is not empty, else the build for this machine."""
    if spec:
        return pip(*shlex.split(spec))
    if is_installed(version):
        return True
    if platform.system() != "Linux" or has_nvidia_gpu():
        return pip(f"torch=={version}")
    return install_cpu(version)


def main() -> None:
    """Install the release named on the command line, or exit saying what was tried."""
    version, spec = sys.argv[1], os.environ.get("TORCH_SPEC", "")
    if not install(version, spec):
        sys.exit(f"TORCH_SPEC={spec!r} failed." if spec else ADVICE.format(version=version))


if __name__ == "__main__":
    main()
