"""``peft-fsrl diff``: two adapters on the same SAE, feature by feature."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..analysis import statistics
from ..analysis.audit_report import render_difference
from ..analysis.diff import compute_difference
from ..analysis.labels import require_fit
from ..analysis.segments import only_layer
from ..files import write_text_atomically
from ._inputs import (
    add_data_arguments,
    add_model_arguments,
    load_adapter,
    load_label_file,
    load_rows,
    read_config,
    text_of_features,
)

_SECOND = "second"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl diff``."""
    add = parser.add_argument
    add("first", help="folder or Hub repository of an adapter")
    add("second", help="of another one on the same SAE")
    add("--base-model", help="base model; by default the one that the first adapter names")
    add("--labels", help="labels of features: a .csv or .json file, or 'organism'")
    add("--n-features", type=int, default=30, help="features to print (30)")
    add("--json", type=Path, help="write the record there, with all features")
    add_data_arguments(parser, n_pairs=400)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, print."""
    if args.n_features < 0:
        raise ValueError(f"Expected --n-features of 0 or more, got {args.n_features}.")
    statistics.require()
    labels = load_label_file(args.labels)
    one, other = (read_config(name) for name in (args.first, args.second))
    _require_same_sae(args, one.sae_info, other.sae_info)
    model, tokenizer, _ = load_adapter(args.first, args)
    if labels is not None:
        info = only_layer(model).fsrl_sae["default"].info
        require_fit(labels, d_sae=info.d_sae, fingerprint=info.fingerprint)
    model.load_adapter(args.second, adapter_name=_SECOND)
    rows, dataset_name = load_rows(args, tokenizer)
    difference = compute_difference(
        model,
        rows,
        tokenizer,
        first="default",
        second=_SECOND,
        names=(args.first, args.second),
        labels=text_of_features(labels),
        n_features=None,
        dataset_name=dataset_name,
        batch_size=args.batch_size,
        description="feature use,",
    )
    if args.json:
        write_text_atomically(args.json, difference.to_json())
    sys.stdout.write(render_difference(difference, args.n_features))
    return 0


def _require_same_sae(args: argparse.Namespace, one: object, other: object) -> None:
    """Said before any model is loaded."""
    prints = [info.get("fingerprint") if isinstance(info, dict) else None for info in (one, other)]
    if None not in prints and prints[0] != prints[1]:
        raise ValueError(
            f"Expected two adapters on the same SAE, found fingerprint {str(prints[0])[:16]}... in "
            f"{args.first} and {str(prints[1])[:16]}... in {args.second}: feature 5 of one has "
            "nothing to do with feature 5 of the other. Compare adapters of one SAE."
        )
