"""``peft-fsrl lm-eval``: lm-evaluation-harness's own program, with FSRL adapters known to PEFT."""

from __future__ import annotations

import argparse

from ..analysis.harness import run_program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that follows the command, options included: the parser must know no option itself."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of lm_eval")


def run(args: argparse.Namespace) -> int:
    """Hand over."""
    run_program(args.arguments)
    return 0
