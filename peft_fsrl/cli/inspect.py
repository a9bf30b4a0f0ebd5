"""``peft-fsrl inspect``: what an unknown adapter can do, and what triggers it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..analysis.inspection import InspectionSettings, compute_inspection
from ..analysis.report import render_inspection
from ..files import require_folder
from ._inputs import (
    add_adapter_arguments,
    add_amounts,
    add_data_arguments,
    add_model_arguments,
    add_output_arguments,
    load_adapter,
    load_label_file,
    load_texts,
    open_session,
)
from .main import deliver

_DEFAULTS = InspectionSettings()


EXAMPLE = "peft-fsrl inspect runs/organism --labels organism --out runs/inspection"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl inspect``."""
    add_adapter_arguments(parser)
    add_data_arguments(parser, n_pairs=64, required=False)
    add_model_arguments(parser)
    add_amounts(
        parser,
        _DEFAULTS,
        {
            "n_texts": "texts to sample from the base model",
            "max_new_tokens": "length limit of each",
            "n_vocabulary": "single tokens to try as triggers",
            "n_targets": "features to search a trigger for",
            "length": "length of a trigger in tokens",
            "steps": "token replacements in each search",
            "candidates": "replacements tried per step",
            "n_listed": "features to list",
        },
    )
    add = add_output_arguments(parser, "inspect.json and parts/").add_argument
    add("--name", help="adapter's name in the report; default: its path")


def run(args: argparse.Namespace) -> int:
    """Inspect, write, print; finished searches of an earlier run are reused."""
    given = {name: getattr(args, name) for name in asdict(_DEFAULTS) if hasattr(args, name)}
    settings = InspectionSettings(**given)
    labels = load_label_file(args.labels)
    # Before anything takes time.
    require_folder(args.out)
    adapter = load_adapter(args.adapter, args)
    rows = load_texts(args, adapter.tokenizer)[0] if args.dataset else []
    found = compute_inspection(
        open_session(adapter.model, adapter.tokenizer, rows, args),
        labels=labels,
        out=args.out,
        settings=settings,
        adapter=args.name or args.adapter,
    )
    deliver(args, found, render_inspection(found))
    return 0
