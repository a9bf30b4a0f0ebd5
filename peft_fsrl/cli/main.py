"""Parser, error handling and output of ``peft-fsrl``."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..analysis.layout import clean_text
from ..files import write_text_atomically
from ..records import Record

# 1 is Python's own, for an error that nobody expected.
WRONG_REQUEST, DOES_NOT_FIT, INTERRUPTED = 2, 3, 130
# A command's module has `EXAMPLE`, `add_arguments(parser)` and `run(args) -> int`. Only that of the
# requested command is imported.
COMMANDS = {
    "audit": "measure what an adapter changed, and which features carry it",
    "data": "measure what a preference set will teach; write a curated copy",
    "checkup": "check whether an SAE fits a model and its data",
    "labels": "have a judge label the features that an adapter steers",
    "inspect": "find what an unknown adapter can do, without any data",
    "diff": "compare two adapters on the same SAE, feature by feature",
    "serve": "serve adapters through an OpenAI-compatible API",
    "chat": "chat in the terminal, with the features behind each token",
    "app": "chat in the browser, base and trained model side by side",
    "eval": "evaluate an adapter beside its base model",
}
_EXPECTED = (ValueError, TypeError, OSError, ImportError, IndexError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None for those of this process.

    Returns:
        The exit status: 0; 2 for a wrong request; 3 if ``checkup`` finds that the SAE does not
        fit; 130 if interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = make_parser(given).parse_args(given)
    logging.basicConfig(level=logging.INFO if options.debug else logging.WARNING, format=_FORMAT)
    with warnings.catch_warnings():
        if not options.debug:
            warnings.showwarning = _show_warning
            # Deprecations in libraries do not concern the user of a command.
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            resume = ". Run the same command again to resume." if hasattr(options, "out") else ""
            sys.stderr.write(f"\ninterrupted{resume}\n")
            return INTERRUPTED
        except _EXPECTED as error:
            if options.debug:
                raise
            sys.stderr.write(f"error: {one_line(error)}\n")
            return WRONG_REQUEST


_FORMAT = "%(levelname)s %(name)s: %(message)s"


def deliver(args: argparse.Namespace, record: Record, text: str, *files: str) -> None:
    """Write a command's record as ``COMMAND.json`` under ``--out``, and print the report.

    Args:
        args: the command's; with ``json``, the record is printed and not the report.
        record: what was found.
        text: the report.
        files: what else the command has written under ``--out``.
    """
    if args.out:
        name = f"{args.command}.json"
        write_text_atomically(args.out / name, record.to_json())
        text = f"{text.rstrip()}\n\nWritten to {args.out}: {', '.join((name, *files))}"
    say(record.to_json() if args.json else text)


def say(text: str) -> None:
    """Write to standard output, without what the encoding or a terminal cannot take."""
    encoding = sys.stdout.encoding or "utf-8"
    text = clean_text(text).encode(encoding, "replace").decode(encoding)
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(clean_text(str(error)).split()) or type(error).__name__


class _Help(argparse.HelpFormatter):
    """One line an option, no list of all options above, the example as it is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=27)

    def format_help(self) -> str:
        # Groups follow each other without a blank line, so that all of them fit a screen.
        return re.sub(r"(\n  .*)\n\n(?=\S.*:\n  -)", r"\1\n", super().format_help())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_EXAMPLE):
            return text
        return super()._fill_text(text, width, indent)


_EXAMPLE = "example:\n"


def make_parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command line; only the command that it names has its options."""
    parser = argparse.ArgumentParser(
        prog="peft-fsrl",
        formatter_class=_Help,
        description="Read what preference optimization taught a model, feature by feature.",
        epilog=f"{_EXAMPLE}  peft-fsrl checkup --model organism --sae organism --dataset organism",
        usage="peft-fsrl COMMAND [options]; peft-fsrl COMMAND --help",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, dest="command", prog="peft-fsrl"
    )
    asked = next((word for word in given if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[:1].upper()}{text[1:]}.",
            formatter_class=_Help,
            add_help=False,
        )
        command.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        if name != asked:
            continue
        module: Any = import_module(f".{name}", __package__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
        text = "show tracebacks, all warnings and the log"
        command._action_groups[-1].add_argument("--debug", action="store_true", help=text)
        command.usage = _usage(command)
        command.epilog = f"{_EXAMPLE}  {module.EXAMPLE}"
    return parser


def _usage(parser: argparse.ArgumentParser) -> str:
    """What must be given, without the rest."""
    words = [parser.prog]
    for action in parser._actions:
        if not action.option_strings:
            words.append(str(action.metavar))
        elif action.required:
            words.append(f"{action.option_strings[0]} {action.metavar}")
    indent = " " * (len(f"usage: {parser.prog}") + 1)
    return textwrap.fill(" ".join([*words, "[options]"]), 72, subsequent_indent=indent)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"warning: {one_line(message)}\n")
