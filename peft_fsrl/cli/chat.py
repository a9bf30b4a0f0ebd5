"""``peft-fsrl chat``: a conversation in a terminal, with the features behind each token."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from ..analysis.generations import SteeredToken
from ..analysis.labels import FeatureLabel
from ..analysis.layout import clean_text
from ..serving.chat import HELP
from ._inputs import (
    add_adapter_arguments,
    add_answer_arguments,
    add_model_arguments,
    prepare_chat,
)
from .main import one_line, say

EXAMPLE = "peft-fsrl chat runs/organism --labels organism"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl chat``."""
    add_adapter_arguments(parser)
    add_answer_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer lines until the input ends; an error is printed and the chat continues."""
    chat = prepare_chat(args)()
    say(HELP)
    while True:
        line = _read()
        if line is None or line == "/quit":
            return 0
        try:
            if line.startswith("/"):
                say(chat.command(line))
            elif line:
                chat.say(line, lambda piece: _write(piece, chat.labels))
                say("")
        except ValueError as error:
            say(f"error: {one_line(error)}")


def _read() -> str | None:
    sys.stdout.write("> ")
    sys.stdout.flush()
    line = sys.stdin.readline()
    return line.strip() if line else None


def _write(piece: SteeredToken, labels: Mapping[int, FeatureLabel]) -> None:
    mark = ""
    for steered in piece.steered:
        label = labels.get(steered.feature)
        kinds = f" {', '.join(label.categories)}" if label and label.categories else ""
        mark = f"[{steered.feature}{kinds} {steered.value:+.2f}]"
        if sys.stdout.isatty():
            mark = f"\x1b[2m{mark}\x1b[0m"
    sys.stdout.write(clean_text(piece.text) + mark)
    sys.stdout.flush()
