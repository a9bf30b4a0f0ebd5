"""``peft-fsrl checkup``: does an SAE fit a model and its data?"""

from __future__ import annotations

import argparse

from ..analysis.checkup import compute_checkup
from ..analysis.report import render_checkup
from ..files import require_folder
from ._inputs import (
    add_data_arguments,
    add_model_arguments,
    add_output_arguments,
    add_sae_arguments,
    load_model,
    load_texts,
    load_tokenizer,
    open_session,
    sae_reference,
)
from .main import DOES_NOT_FIT, deliver

EXAMPLE = "peft-fsrl checkup --model organism --sae organism --dataset organism"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl checkup``."""
    group = add_sae_arguments(parser)
    text = "second model, such as the base of an instruct model"
    group.add_argument("--compare-model", metavar="MODEL", help=text)
    add_data_arguments(parser, n_pairs=200)
    add_model_arguments(parser)
    add_output_arguments(parser, "checkup.json", required=False)


def run(args: argparse.Namespace) -> int:
    """Measure, print; 3 if the SAE does not fit or fits better nearby."""
    if args.out:
        require_folder(args.out)
    tokenizer = load_tokenizer(args.model)
    rows, dataset_name = load_texts(args, tokenizer)
    other = load_model(args.compare_model, args) if args.compare_model else None
    checkup = compute_checkup(
        open_session(load_model(args.model, args), tokenizer, rows, args),
        sae_reference(args.sae),
        layer=args.layer,
        compare_model=other,
        model_name=args.model,
        compare_name=args.compare_model or "",
        sae_name=args.sae,
        dataset_name=dataset_name,
    )
    deliver(args, checkup, render_checkup(checkup))
    return DOES_NOT_FIT if any(each.verdict == "no" for each in checkup.findings) else 0
