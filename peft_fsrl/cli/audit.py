"""``peft-fsrl audit``: every analysis of one adapter, as JSON and as a page."""

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
    add_adapter_arguments,
    add_amounts,
    add_data_arguments,
    add_model_arguments,
    add_output_arguments,
    load_adapter,
    load_label_file,
    load_rows,
    open_session,
)
from .main import deliver

_DEFAULTS = AuditSettings()
EXAMPLE = "peft-fsrl audit runs/organism --dataset organism --out runs/audit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl audit``."""
    add = add_adapter_arguments(parser).add_argument
    add("--reference-labels", metavar="FILE", help="other labels, to measure agreement")
    add("--categories", metavar="A,B", help="categories to report; default: all")
    text = "accuracy of the labels (MCC): 0.5, or style=0.5"
    add("--label-mcc", metavar="MCC", type=_label_mcc, help=text)
    add_data_arguments(parser, n_pairs=400)
    add_model_arguments(parser, simpo=True)
    add_amounts(
        parser,
        _DEFAULTS,
        {
            "n_generations": "prompts to continue, with features per token",
            "n_coherence": "prompts to answer, to measure fluency",
            "max_new_tokens": "length limit of an answer",
            "n_random": "draws of each random control",
            "n_single": "features to ablate one by one",
        },
    )
    add = add_output_arguments(parser, "audit.json, audit.html and parts/").add_argument
    add("--name", help="adapter's name in the report; default: its path")
    add("--update-card", action="store_true", help="put a summary into the adapter's README.md")


def _label_mcc(text: str) -> float | dict[str, float]:
    """One number, or one for each category: ``alignment=0.548,style=0.461``."""
    if "=" not in text:
        return float(text)
    parts = [part.split("=") for part in text.split(",")]
    return {name.strip(): float(value) for name, value in parts}


def run(args: argparse.Namespace) -> int:
    """Audit, write, print; finished stages of an earlier run are reused."""
    # Before anything takes time.
    statistics.require()
    require_plots()
    folder = Path(args.adapter)
    if args.update_card and not folder.is_dir():
        raise ValueError(f"--update-card needs a local folder, got {args.adapter!r}.")
    labels, reference = map(load_label_file, (args.labels, args.reference_labels))
    adapter = load_adapter(args.adapter, args)
    rows, dataset_name = load_rows(args, adapter.tokenizer)
    given = {name: getattr(args, name) for name in vars(_DEFAULTS) if hasattr(args, name)}
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
    page = render_audit_html(audit, draw_audit(audit))
    write_text_atomically(args.out / "audit.html", page)
    if args.update_card:
        add_audit(folder, audit)
    deliver(args, audit, render_audit(audit), "audit.html")
    return 0
