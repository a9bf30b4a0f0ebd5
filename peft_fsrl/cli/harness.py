"""``peft-fsrl lm-eval``: lm-evaluation-harness's own program, with FSRL adapters known to PEFT."""

from __future__ import annotations

import argparse

from ..analysis.harness import run_program

HELP = "run lm-evaluation-harness's own program: peft-fsrl lm-eval run --model hf ..."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything goes to ``lm_eval``; the parser must have no prefix for options of its own."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of lm_eval")


def run(args: argparse.Namespace) -> int:
    """Hand over."""
    run_program(args.arguments)
    return 0
