"""``peft-fsrl app``: base and trained model side by side in a browser."""

from __future__ import annotations

import argparse

from ._inputs import (
    add_adapter_arguments,
    add_answer_arguments,
    add_model_arguments,
    add_server_arguments,
    prepare_chat,
)

EXAMPLE = "peft-fsrl app runs/organism --labels organism"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl app``."""
    add_adapter_arguments(parser)
    add_answer_arguments(parser)
    add_server_arguments(parser, 7860)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the page until interrupted."""
    # First, because a model takes long to load and Gradio may be missing.
    from ..serving.app import N_FEATURES, run_app

    run_app(prepare_chat(args, N_FEATURES), args.host, args.port)
    return 0
