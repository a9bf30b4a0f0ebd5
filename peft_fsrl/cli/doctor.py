"""``peft-fsrl doctor``: does an SAE fit a model and its data?"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..analysis.doctor import compute_checkup
from ..analysis.report import render_checkup
from ..files import write_text_atomically
from ._inputs import (
    add_data_arguments,
    add_model_arguments,
    load_model,
    load_texts,
    load_tokenizer,
    open_session,
    sae_reference,
)
from .main import say

DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl doctor``."""
    add = parser.add_argument
    add("--model", required=True, help="the base model; 'organism' for the built-in one")
    add("--sae", required=True, help="a folder or release/sae_id; 'organism' for the built-in one")
    add("--layer", type=int, help="layer to steer; default: the one the SAE was trained on")
    add("--compare-model", help="another model, such as the base model of an instruct model")
    add("--json", type=Path, help="also write the figures to this file")
    add_data_arguments(parser, n_pairs=200)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print; 1 if the SAE does not fit or fits better nearby."""
    tokenizer = load_tokenizer(args.model)
    rows, dataset_name = load_texts(args, tokenizer)
    other = load_model(args.compare_model, args) if args.compare_model else None
    checkup = compute_checkup(
        replace(
            open_session(load_model(args.model, args), tokenizer, rows, args),
            max_length=args.max_length,
        ),
        sae_reference(args.sae),
        layer=args.layer,
        compare_model=other,
        model_name=args.model,
        compare_name=args.compare_model or "",
        sae_name=args.sae,
        dataset_name=dataset_name,
    )
    if args.json:
        write_text_atomically(args.json, checkup.to_json())
    say(render_checkup(checkup))
    return DOES_NOT_FIT if any(each.verdict == "no" for each in checkup.findings) else 0
