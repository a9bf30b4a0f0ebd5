"""``peft-fsrl labels``: a judge's labels for the features that an adapter steers most."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..analysis import compute_usage
from ..analysis.labels import (
    Category,
    FeatureEvidence,
    Judge,
    Labels,
    collect_evidence,
    collect_held_out,
    default_categories,
    describe_features,
    for_model,
    judge_features,
    load_neuronpedia,
    measure_detection,
    with_quality,
)
from ..analysis.session import Session
from ..files import require_folder
from ._inputs import (
    add_adapter_arguments,
    add_data_arguments,
    add_model_arguments,
    add_output_arguments,
    load_adapter,
    load_rows,
    open_session,
)
from .main import deliver

EXAMPLE = """peft-fsrl labels runs/organism --dataset organism --out runs/labels \\
      --judge-url http://localhost:8000/v1 --judge-model my-model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl labels``."""
    add_adapter_arguments(parser, labels=False)
    add = parser.add_argument_group("judge").add_argument
    text = "an OpenAI-compatible endpoint, http://host:8000/v1"
    add("--judge-url", metavar="URL", required=True, help=text)
    add("--judge-model", metavar="NAME", required=True, help="the judge's name there")
    text = "Markdown file that defines a category; may be repeated"
    add("--category", metavar="FILE", action="append", help=text)
    text = "downloaded descriptions, file or folder"
    add("--neuronpedia", metavar="PATH", help=text)
    text = "label the N most steered features; 0 = all (200)"
    add("--n-features", metavar="N", type=int, default=200, help=text)
    text = "skip the test of descriptions on held-out texts"
    add("--no-quality", action="store_true", help=text)
    add_data_arguments(parser, n_pairs=400)
    add_model_arguments(parser)
    add_output_arguments(parser, "labels.json and answers.jsonl")


def run(args: argparse.Namespace) -> int:
    """Ask, write, report the cost; answers of an earlier run are reused."""
    if args.n_features < 0:
        raise ValueError(f"Expected --n-features of 0 or more, got {args.n_features}.")
    categories = _categories(args.category)
    require_folder(args.out)
    answers = args.out / "answers.jsonl"
    judge = Judge(args.judge_url, args.judge_model, cache=answers, progress=True)
    model, tokenizer, _ = load_adapter(args.adapter, args)
    rows, _ = load_rows(args, tokenizer)
    usage = compute_usage(open_session(model, tokenizer, rows, args))
    features = [use.feature for use in usage.features][: args.n_features or None]
    session = Session(
        model, tokenizer, rows, batch_size=args.batch_size, seed=args.seed, progress=True
    )
    evidence = collect_evidence(session, features)
    # Of a feature without a context there is nothing to ask.
    seen = tuple(each for each in evidence if each.contexts)
    described = _describe(args, seen, judge)
    labels = judge_features(seen, categories, judge, descriptions=described)
    if not args.no_quality:
        held_out = collect_held_out(session, [each.feature for each in seen])
        detections = measure_detection(described, held_out, judge, evidence=seen, seed=args.seed)
        labels = with_quality(labels, detections)
    labels = for_model(labels, model)
    deliver(args, labels, _render(labels, judge, len(features) - len(seen)), answers.name)
    return 0


def _categories(paths: Sequence[str] | None) -> tuple[Category, ...]:
    return tuple(map(Category.from_file, paths)) if paths else default_categories()


def _describe(
    args: argparse.Namespace, evidence: Sequence[FeatureEvidence], judge: Judge
) -> Labels:
    if args.neuronpedia is not None:
        return load_neuronpedia(args.neuronpedia)
    return describe_features(evidence, judge)


def _render(labels: Labels, judge: Judge, n_unseen: int) -> str:
    qualities = [each.quality for each in labels.features if each.quality is not None]
    counts: dict[str, Any] = {name: len(labels.members(name)) for name in labels.categories}
    lines = [
        f"{len(labels.features)} features labeled: "
        + ", ".join(f"{count} {name}" for name, count in counts.items())
    ]
    if labels.undecided:
        lines.append(f"{len(labels.undecided)} undecided: answers that cannot be read")
    if n_unseen:
        lines.append(f"{n_unseen} not asked about: never active in these texts")
    if qualities:
        mean = sum(qualities) / len(qualities)
        lines.append(
            f"descriptions tell held-out texts apart with accuracy {mean:.2f} on average "
            f"({len(qualities)} features; chance is 0.50)"
        )
    spend = judge.spend
    lines.append(
        f"cost: {spend.requests} requests, {spend.cached} answers from an earlier run, "
        f"{spend.prompt_tokens} + {spend.completion_tokens} tokens"
    )
    return "\n".join(lines)
