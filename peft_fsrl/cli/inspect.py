"""``peft-fsrl inspect``: what an adapter that nobody knows can do, and what makes it act."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ..analysis.inspection import InspectionSettings, compute_inspection
from ..analysis.report import render_inspection
from ..files import require_folder, write_text_atomically
from ._inputs import (
    add_data_arguments,
    add_model_arguments,
    load_adapter,
    load_label_file,
    load_texts,
    open_session,
)
from .main import say

_DEFAULTS = InspectionSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl inspect``."""
    add = parser.add_argument
    add("adapter", help="folder or Hub repository of an adapter")
    add("--out", type=Path, default=Path("inspection"), help="folder for inspect.json and parts/")
    add("--name", help="name of the adapter in the report; default: its path")
    add("--base-model", help="base model; default: the one the adapter names")
    add("--labels", help="labels of features: a .csv or .json file, or 'organism'")
    add_data_arguments(parser, n_pairs=64, required=False)
    add_model_arguments(parser)
    group = parser.add_argument_group("amount of work")
    for name, text in (
        ("n_texts", "texts to sample from the base model"),
        ("max_new_tokens", "length limit of each"),
        ("n_vocabulary", "single tokens to try as triggers"),
        ("n_targets", "features to search a trigger for"),
        ("length", "length of a trigger in tokens"),
        ("steps", "token replacements in each search"),
        ("candidates", "replacements tried per step"),
        ("n_listed", "features to list"),
        ("n_listens", "input features listed for each"),
        ("n_tokens", "promoted and suppressed tokens listed for each"),
    ):
        default = getattr(_DEFAULTS, name)
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=int, default=default, help=f"{text} ({default})")


def run(args: argparse.Namespace) -> int:
    """Inspect, write, print; searches that an earlier run has finished are not made again."""
    settings = InspectionSettings(**{name: getattr(args, name) for name in asdict(_DEFAULTS)})
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
    write_text_atomically(args.out / "inspect.json", found.to_json())
    say(f"{render_inspection(found)}\nAll figures are in {args.out / 'inspect.json'}")
    return 0
