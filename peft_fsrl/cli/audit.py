"""``peft-fsrl audit``: everything that can be said about one adapter, as JSON and as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..analysis import statistics
from ..analysis.audit import AuditSettings, compute_audit
from ..analysis.plots import draw_audit, require_plots
from ..analysis.rendering import add_audit, render_audit_html
from ..analysis.report import render_audit
from ..files import write_text_atomically
from ._inputs import (
    add_data_arguments,
    add_model_arguments,
    load_adapter,
    load_label_file,
    load_rows,
    open_session,
)
from .main import say

_DEFAULTS = AuditSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl audit``."""
    add = parser.add_argument
    add("adapter", help="folder or Hub repository of a trained adapter")
    add("--out", type=Path, required=True, help="folder for audit.json, audit.html and parts/")
    add("--name", help="name of the adapter in the report; default: its path")
    add("--base-model", help="base model; default: the one the adapter names")
    add("--labels", help="labels of features: a .csv or .json file, or 'organism'")
    add("--reference-labels", help="second set of labels, to measure agreement with")
    add("--categories", help="comma-separated categories of the labels; default: all")
    add("--update-card", action="store_true", help="put a summary into the adapter's README.md")
    add_data_arguments(parser, n_pairs=400)
    add_model_arguments(parser)
    group = parser.add_argument_group("amount of work")
    for name, text in (
        ("n_generations", "prompts to continue, with the features of each token"),
        ("n_coherence", "prompts to answer to measure fluency"),
        ("max_new_tokens", "length limit of an answer"),
        ("n_random", "draws of each random control"),
        ("n_single", "features to ablate one by one"),
        ("n_cards", "promoted and suppressed features to show in detail"),
        ("n_draws", "resamples of the labels' errors"),
    ):
        default = getattr(_DEFAULTS, name)
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=int, default=default, help=f"{text} ({default})")
    group.add_argument(
        "--label-mcc",
        type=_label_mcc,
        metavar="MCC",
        help="known correlation (MCC) of the labels with the truth, one value or one per category "
        "(the paper's judge: alignment=0.548,style=0.461 on Gemma-2-9B)",
    )
    group.add_argument("--beta", type=float, default=10.0, help="SimPO's reward scale")
    group.add_argument("--gamma", type=float, default=5.0, help="SimPO's target margin")


def _label_mcc(text: str) -> float | dict[str, float]:
    """One number, or one for each category: ``alignment=0.548,style=0.461``."""
    if "=" not in text:
        return float(text)
    parts = [part.split("=") for part in text.split(",")]
    return {name.strip(): float(value) for name, value in parts}


def run(args: argparse.Namespace) -> int:
    """Audit, write, print; stages that an earlier run has finished are not made again."""
    # Before anything takes time.
    statistics.require()
    require_plots()
    folder = Path(args.adapter)
    if args.update_card and not folder.is_dir():
        raise ValueError(f"--update-card needs a local folder, got {args.adapter!r}.")
    labels, reference = map(load_label_file, (args.labels, args.reference_labels))
    adapter = load_adapter(args.adapter, args)
    rows, dataset_name = load_rows(args, adapter.tokenizer)
    given = {name: getattr(args, name) for name in vars(_DEFAULTS) if name != "n_listed"}
    if args.categories is not None:
        given["categories"] = tuple(name.strip() for name in args.categories.split(","))
    settings = AuditSettings(**given)
    audit = compute_audit(
        open_session(adapter.model, adapter.tokenizer, rows, args),
        labels=labels,
        reference_labels=reference,
        out=args.out,
        settings=settings,
        adapter=args.name or args.adapter,
        dataset_name=dataset_name,
        run_folder=folder if folder.is_dir() else None,
    )
    write_text_atomically(args.out / "audit.json", audit.to_json())
    page = render_audit_html(audit, draw_audit(audit))
    write_text_atomically(args.out / "audit.html", page)
    if args.update_card:
        add_audit(folder, audit)
    say(f"{render_audit(audit)}\nThe page is {args.out / 'audit.html'}")
    return 0
