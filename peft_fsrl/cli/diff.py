"""``peft-fsrl diff``: two adapters on the same SAE, feature by feature."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ..analysis import statistics
from ..analysis.audit.info import short_texts
from ..analysis.diff import compute_difference
from ..analysis.labels import require_fit
from ..analysis.report import render_difference
from ..analysis.segments import only_layer
from ..files import require_folder
from ._inputs import (
    add_data_arguments,
    add_labels_argument,
    add_model_arguments,
    add_output_arguments,
    load_adapter,
    load_label_file,
    load_rows,
    open_session,
    read_config,
)
from .main import deliver

_SECOND = "second"


EXAMPLE = "peft-fsrl diff runs/one runs/other --dataset organism --out runs/diff"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl diff``."""
    group = parser.add_argument_group("adapters")
    add = group.add_argument
    add("first", metavar="FIRST", help="folder or Hub repository of an adapter")
    add("second", metavar="SECOND", help="another adapter on the same SAE")
    add("--base-model", metavar="MODEL", help="default: the base model that FIRST names")
    add_labels_argument(group)
    add_data_arguments(parser, n_pairs=400)
    add_model_arguments(parser)
    group = add_output_arguments(parser, "diff.json, with all features", required=False)
    text = "features to print; 0 = none (30)"
    group.add_argument("--n-features", metavar="N", type=int, default=30, help=text)


def run(args: argparse.Namespace) -> int:
    """Compare, print."""
    if args.n_features < 0:
        raise ValueError(f"Expected --n-features of 0 or more, got {args.n_features}.")
    statistics.require()
    if args.out:
        require_folder(args.out)
    labels = load_label_file(args.labels)
    require_same_saes(args, *(read_config(name).sae_info for name in (args.first, args.second)))
    adapter = load_adapter(args.first, args)
    if labels is not None:
        info = only_layer(adapter.model).fsrl_sae["default"].info
        require_fit(labels, d_sae=info.d_sae, fingerprint=info.fingerprint)
    adapter.model.load_adapter(args.second, adapter_name=_SECOND)
    rows, dataset_name = load_rows(args, adapter.tokenizer)
    difference = compute_difference(
        open_session(adapter.model, adapter.tokenizer, rows, args),
        "default",
        _SECOND,
        names=(args.first, args.second),
        labels=short_texts(labels),
        n_features=None,
        dataset_name=dataset_name,
    )
    deliver(args, difference, render_difference(difference, args.n_features))
    return 0


def require_same_saes(args: argparse.Namespace, first: object, second: object) -> None:
    """Refuse adapters on unlike SAEs before any model is loaded, by what their configs say.

    Raises:
        ValueError: for another SAE at any layer, or other layers.
    """
    one, other = _fingerprints(first), _fingerprints(second)
    # One SAE for every layer, or the same for this layer by its number.
    alike = one == other or ("" in one | other and set(one.values()) == set(other.values()))
    if one and other and not alike:
        described = [
            ", ".join(f"{layer or 'every layer'}: {found[:16]}..." for layer, found in each.items())
            for each in (one, other)
        ]
        raise ValueError(
            f"Expected two adapters on the same SAE, found fingerprints {described[0]} in "
            f"{args.first} and {described[1]} in {args.second}: feature 5 of one has nothing to do "
            "with feature 5 of the other. Compare adapters of one SAE at one layer."
        )


def _fingerprints(infos: object) -> dict[str, str]:
    """By layer, what a config says of its SAEs."""
    found = infos if isinstance(infos, Mapping) else {}
    return {layer: str(info.get("fingerprint")) for layer, info in found.items() if info}
