"""``peft-fsrl data``: what a preference set will teach, before any training; a curated copy."""

from __future__ import annotations

import argparse
from typing import Any

from ..analysis import statistics
from ..analysis.audit.info import short_texts
from ..analysis.data import DROP, RELABEL, apply_curation, compute_contrast, compute_curation
from ..analysis.labels import Labels, require_fit
from ..analysis.report import render_contrast, render_curation
from ..analysis.segments import active_sae
from ..files import replacing_file, require_folder, write_text_atomically
from ._inputs import (
    add_data_arguments,
    add_labels_argument,
    add_model_arguments,
    add_output_arguments,
    add_sae_arguments,
    as_texts,
    load_label_file,
    load_model,
    load_preferences,
    load_tokenizer,
    open_session,
    sae_reference,
    whole_number,
)
from .main import deliver

EXAMPLE = """peft-fsrl data --model organism --sae organism --dataset organism \\
      --out runs/data"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl data``."""
    group = add_sae_arguments(parser)
    add_labels_argument(group)
    group.add_argument("--categories", metavar="A,B", help="categories to report; default: all")
    add_data_arguments(parser, n_pairs=0, split="train", held_out=False)
    add = parser.add_argument_group("report").add_argument
    add("--topic", metavar="COLUMN", help="column with topics; default: clusters of prompts")
    text = "clusters of prompts; 1 = no control for topic (8)"
    add("--n-topics", metavar="N", type=whole_number(1), default=8, help=text)
    text = "features to report (50)"
    add("--n-features", metavar="N", type=whole_number(0), default=50, help=text)
    text = "features with examples (4)"
    add("--n-examples", metavar="N", type=whole_number(0), default=4, help=text)
    group = parser.add_argument_group("curated copy (FEATURES such as 66,137 or style)")
    both = group.add_mutually_exclusive_group()
    for action, text in (
        (DROP, "drop pairs until these features decide nothing"),
        (RELABEL, "flip pairs that these features alone explain"),
    ):
        both.add_argument(f"--{action}", metavar="FEATURES", help=text)
    add_model_arguments(parser, simpo=True)
    add_output_arguments(parser, "data.json, curated.jsonl and parts/")


def run(args: argparse.Namespace) -> int:
    """Read, report, write; readings of an earlier run are reused."""
    statistics.require()
    action = DROP if args.drop is not None else RELABEL
    asked = args.drop if action == DROP else args.relabel
    labels = load_label_file(args.labels)
    categories = _categories(labels, args.categories)
    features = None if asked is None else _features(asked, labels)
    require_folder(args.out)
    tokenizer = load_tokenizer(args.model)
    dataset, dataset_name = load_preferences(args, tokenizer)
    topics = _topics(dataset, args.topic)
    session = open_session(_with_sae(args), tokenizer, as_texts(dataset, tokenizer), args)
    sae = active_sae(session.model)
    if labels is not None:
        require_fit(labels, d_sae=sae.info.d_sae, fingerprint=sae.info.fingerprint)
    # Known before the work that a copy comes after.
    sae.positions(features or [])
    parts = args.out / "parts"
    contrast = compute_contrast(
        session,
        labels=short_texts(labels),
        categories=categories,
        topics=topics,
        n_topics=args.n_topics,
        n_features=args.n_features,
        n_examples=args.n_examples,
        out=parts,
        dataset_name=dataset_name,
    )
    report, files = render_contrast(contrast), []
    if features is not None:
        curation = compute_curation(session, features, action, out=parts)
        with replacing_file(args.out / "curated.jsonl") as unfinished:
            apply_curation(dataset, curation).to_json(unfinished, force_ascii=False)
        write_text_atomically(args.out / "curation.json", curation.to_json())
        report = f"{report}\n{render_curation(curation)}"
        files = ["curated.jsonl", "curation.json"]
    deliver(args, contrast, report, *files)
    return 0


def _with_sae(args: argparse.Namespace) -> Any:
    """The base model with an adapter of the least size: through it analyses see the SAE."""
    from peft import get_peft_model

    from ..tuner.config import FSRLConfig

    config = FSRLConfig(layer=args.layer, sae=sae_reference(args.sae), rank=1)
    return get_peft_model(load_model(args.model, args), config).eval()


def _categories(labels: Labels | None, names: str | None) -> dict[str, list[int]]:
    """Features by category: those asked for, or all that have any."""
    if names is not None and labels is None:
        raise ValueError("--categories needs --labels: without them, features have no categories.")
    if labels is None:
        return {}
    return labels.by_category([name.strip() for name in names.split(",")] if names else None)


def _features(asked: str, labels: Labels | None) -> list[int]:
    """The features that were named, by number or by category."""
    known = _categories(labels, None)
    found: list[int] = []
    for word in asked.split(","):
        name = word.strip()
        if name.isdecimal():
            found.append(int(name))
        elif name in known:
            found += known[name]
        else:
            names = f"categories among {list(known)}" if labels else "categories with --labels"
            raise ValueError(f"Expected numbers of features, or {names}, got {name!r}.")
    return found


def _topics(dataset: Any, column: str | None) -> list[str] | None:
    if column is None:
        return None
    if column not in dataset.column_names:
        raise ValueError(
            f"Expected a column {column!r} with topics, found {sorted(dataset.column_names)}."
        )
    return [str(topic) for topic in dataset[column]]
