r"""The tables of docs/paper.md on the model organism: the paper's experiments and its reviewers'.

    python examples/paper.py                     # all of them; about 25 minutes on one core
    python examples/paper.py variants exclusion  # only these

`variants` trains other activations, penalties, optimizers, starts and ranks, `exclusion` without
the features that detect style and without as many random ones. `adapter` looks at one adapter (the
first of `variants`): how concentrated it is, how strongly each category is steered, what fires on
other texts, the loss per feature. Each run is `examples/simpo.py` in a process and a folder of its
own, kept in `sweep.csv`: started again, the script goes on where it was stopped.
`examples/rank.py` has the choice of a layer, `examples/compare.py` other methods.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from peft import PeftModel
from sweep import Table

from peft_fsrl import load_sae, organism
from peft_fsrl.analysis import (
    Session,
    Summary,
    Usage,
    compute_concentration,
    compute_usage,
    measure_categories,
    measure_firing,
    measure_magnitudes,
    render_concentration,
    render_firing,
    render_magnitudes,
)
from peft_fsrl.analysis.layout import title
from peft_fsrl.files import write_text_atomically

L1 = {"l1_coeff": 0.1}
VARIANTS: dict[str, dict[str, object]] = {
    "default: soft threshold, L1 0.1, AdamW, full rank": L1,
    "relu: promotes only": {**L1, "activation": "relu"},
    "f + v may fall below zero": {**L1, "non_negative": False},
    "L2 0.1 for L1": {"l1_coeff": 0.0, "l2_coeff": 0.1},
    "no penalty": {"l1_coeff": 0.0},
    "Muon": {**L1, "optimizer": "muon"},
    "Muon, learning rate 1e-3": {**L1, "optimizer": "muon", "learning_rate": 1e-3},
    "start and threshold 1e-6": {**L1, "init_scale": 1e-6, "init_threshold": 1e-6},
    "start 0.02": {**L1, "init_scale": 0.02},
    "threshold 0.01": {**L1, "init_threshold": 0.01},
    "relu from the SAE's encoder": {**L1, "activation": "relu", "init_weights": "encoder"},
    "rank 1": {**L1, "rank": 1},
    "rank 4": {**L1, "rank": 4},
    "rank 16": {**L1, "rank": 16},
    "rank 1, L1 0.02": {"l1_coeff": 0.02, "rank": 1},
    "rank 4, L1 0.02": {"l1_coeff": 0.02, "rank": 4},
    "as the paper's code since November 2025": {
        **L1,
        "optimizer": "muon",
        "adam_beta2": 0.98,
        "warmup_steps": 0.01,
        "init_scale": 1e-6,
        "init_threshold": 1e-6,
    },
}


def summary_of(table: Table, name: str) -> Summary:
    """What a run said of itself at its end."""
    return Summary.from_json((table.folder / name / "summary.json").read_text())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], form: str) -> str:
    """Mean and, of several, standard deviation."""
    deviation = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}"


def variants(table: Table, args: argparse.Namespace) -> str:
    """One change at a time against the default run."""
    rows = []
    for name, options in VARIANTS.items():
        point = table.run("variants", 2, args.seeds[0], options)
        if not point.finished:
            rows.append([name, "failed", *[""] * 6])
            continue
        style = summary_of(table, point.name).ablations[0]
        rows.append(
            [
                name,
                f"{point.loss:.3f}",
                f"{point.accuracy:.1%}",
                f"{point.l0:.2f}",
                f"{point.l1:.2f}",
                f"{style.mass:.1%}",
                f"{style.rise.value:+.3f}",
                f"{point.perplexity:.2f}",
            ]
        )
    header = ["", "loss", "accuracy", "l0", "l1", "mass of style", "rise without it", "perplexity"]
    return markdown(header, rows)


def exclusion(table: Table, args: argparse.Namespace) -> str:
    """Trained without the features that detect style, and without as many random ones."""
    style = organism.load().features("style")
    settings: dict[str, dict[str, object]] = {
        "all features": L1,
        f"without the {len(style)} that detect style": {**L1, "exclude_features": style},
        f"without {len(style)} random ones": {**L1, "exclude_random": len(style)},
    }
    rows, samples = [], ""
    for name, options in settings.items():
        points = [table.run("exclusion", 2, seed, options) for seed in args.seeds]
        found = [point for point in points if point.finished]
        figures = {"loss": ".3f", "accuracy": ".1%", "l0": ".2f", "l1": ".2f", "perplexity": ".2f"}
        cells = [spread([getattr(p, f) for p in found], form) for f, form in figures.items()]
        rows.append([name, *cells])
        if "exclude_features" in options:
            summary = summary_of(table, found[0].name)
            samples = "\n".join(
                f"{answer.name:16}{answer.text.strip()}"
                for generation in summary.generations
                for answer in generation.continuations
                if answer.name in ("base", "trained")
            )
    header = ["", "loss", "accuracy", "l0", "l1", "perplexity"]
    return f"{markdown(header, rows)}\n\nTrained without style, seed {args.seeds[0]}:\n\n{samples}"


def other_texts(n: int) -> dict[str, list[dict[str, str]]]:
    """Texts of the world that are no answers, by kind; a quiz judges each claim."""
    rng, world = random.Random("paper-texts"), organism.load().world
    return {
        kind: [{"text": " ".join(world.sample_source(rng, kind).words[1:-1])} for _ in range(n)]
        for kind in ("almanac", "rumour", "quiz")
    }


def describe(
    session: Session,
    usage: Usage,
    d_sae: int,
    categories: Mapping[str, Sequence[int]],
    texts: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, str]:
    """Tables of what an adapter steers, by feature and by category, on pairs and on other texts.

    Args:
        session: with the pairs.
        usage: of features on the chosen answers.
        d_sae: features of the SAE.
        categories: feature indices by category.
        texts: rows that a session takes, by kind.

    Returns:
        Tables by their titles.
    """
    parts = {
        "Concentration (chosen answers)": render_concentration(
            compute_concentration(usage, d_sae, categories)
        ),
        "|v| where it is not zero (chosen answers)": render_magnitudes(
            measure_magnitudes(session, categories)
        ),
        "Active features per token (prompt and chosen)": render_firing(
            measure_firing(session, categories)
        ),
    }
    for kind, rows in texts.items():
        firing = measure_firing(replace(session, dataset=rows), categories)
        parts[f"Active features per token ({kind})"] = render_firing(firing)
    return parts


def adapter(table: Table, args: argparse.Namespace) -> str:
    """What one adapter does, by feature and by category, on pairs and on other texts."""
    point = table.run("variants", 2, args.seeds[0], L1)
    creature = organism.load()
    model = PeftModel.from_pretrained(creature.load_model(), table.folder / point.name)
    pairs = creature.preferences(400, seed=f"test-{args.seeds[0]}")
    session = Session(model, creature.load_tokenizer(), pairs, progress=True)
    categories = {name: creature.features(name) for name in ("style", "honesty")}
    usage = compute_usage(session)
    d_sae = load_sae(creature.sae_path).info.d_sae
    parts = describe(session, usage, d_sae, categories, other_texts(200))
    ablations = measure_categories(session, categories, usage)
    parts["Loss per feature removed"] = "\n".join(
        f"{each.name:10}{each.rise.value:+.3f} / {len(each.features)} = {each.rise_per_feature:.2e}"
        for each in ablations
    )
    return "\n".join(f"{title(name)}\n{text}" for name, text in parts.items())


STUDIES = {"variants": variants, "exclusion": exclusion, "adapter": adapter}


def main() -> None:
    """Make what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)}; all without")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--launcher", default=shlex.quote(sys.executable))
    args, others = parser.parse_known_args()
    unknown = set(args.studies) - set(STUDIES)
    if unknown:
        parser.error(f"expected some of {sorted(STUDIES)}, got {sorted(unknown)}")
    table = Table(args.out, shlex.split(args.launcher), ["--eval_steps=300", *others])
    for name in args.studies or STUDIES:
        text = STUDIES[name](table, args)
        write_text_atomically(args.out / f"{name}.md", text + "\n")
        print(f"\n## {name}\n\n{text}")


if __name__ == "__main__":
    main()
