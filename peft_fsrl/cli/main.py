"""The parser of ``peft-fsrl``, and what becomes of errors."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..analysis.layout import clean_text

OK, WRONG_REQUEST, INTERRUPTED = 0, 2, 130
# A command's module has `add_arguments(parser)` and `run(args) -> int`; only the one asked for is
# imported.
COMMANDS = {
    "audit": "measure what an adapter changed, whether it helped, and which features carry it",
    "data": "measure what a preference set will teach, before training; write a curated copy",
    "doctor": "check whether an SAE fits a model and its data, before training",
    "labels": "have a judge label the features that an adapter steers",
    "inspect": "find what an unknown adapter can do and what triggers it; needs no data",
    "diff": "compare two adapters on the same SAE, feature by feature",
    "serve": "serve an adapter through an OpenAI-compatible API",
    "chat": "chat in the terminal, with the features behind each token",
    "eval": "evaluate an adapter beside its base model on standard benchmarks",
}
_EXPECTED = (ValueError, TypeError, OSError, ImportError, IndexError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None for those of this process.

    Returns:
        The exit status: 0; 1 where ``doctor`` finds that an SAE does not fit; 2 for a wrong
        request; 130 if interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser(given).parse_args(given)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format=_FORMAT)
    with warnings.catch_warnings():
        if not options.debug:
            warnings.showwarning = _show_warning
            # Deprecations in libraries do not concern the user of a command.
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            sys.stderr.write(
                "\ninterrupted: run it again to resume after the last finished stage\n"
            )
            return INTERRUPTED
        except _EXPECTED as error:
            if options.debug:
                raise
            sys.stderr.write(f"error: {one_line(error)}\n")
            return WRONG_REQUEST


_FORMAT = "%(levelname)s %(name)s: %(message)s"


def say(text: str) -> None:
    """Write to standard output what every encoding can hold and no terminal obeys."""
    encoding = sys.stdout.encoding or "utf-8"
    text = clean_text(text).encode(encoding, "replace").decode(encoding)
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(clean_text(str(error)).split()) or type(error).__name__


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-fsrl", description=__doc__)
    parser.description = "Read what preference optimization taught a model, feature by feature."
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    asked = next((word for word in given if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
        if name == asked:
            module: Any = import_module(f".{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
        command.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
        command.add_argument("--verbose", action="store_true", help="log more")
    return parser


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"warning: {one_line(message)}\n")
