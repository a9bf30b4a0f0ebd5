"""Is what was planted in preference data read off before training, and can it be taken out?

    python examples/data_study.py                  # the organism: two to three minutes a seed
    python examples/data_study.py --world smollm2  # SmolLM2-135M: a quarter of an hour a seed

Pairs prefer one style in 90 % and the truth in 75 %, and on SmolLM2 a courteous ending in 75 %. Of
each seed: how well the contrast of the data finds the features that detect an attribute, for knobs
from 50 to 95 %; what is left of the preferences when the pairs that style explains alone are
dropped or flipped; what an adapter prefers that was trained on the copies, and which data it
mirrors. What has finished is kept. Writes the tables that docs/data.md shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
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
# Pairs and steps of an adapter on SmolLM2, and pairs that differ in one attribute alone.
N_PAIRS, N_STEPS, N_SINGLE = 480, 60, 48
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

    The margin is SimPO's reward of the answer with the attribute less that of the other, where
    nothing else differs. Of the base model it stands alone.
    """

    name: str
    n_pairs: int | None = None
    style: float | None = None
    courtesy: float | None = None
    honesty: float | None = None
    style_margin: Interval | None = None
    courtesy_margin: Interval | None = None
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
        single: by attribute, other pairs that differ in it alone; chosen has it.
        n_sweep: pairs to look at for each knob.
        n_mirror: pairs on which an adapter is compared with its data.
        load_model: a base model of its own.
        train: saves an adapter, trained on pairs, below a folder, unless it was trained before.
    """

    session: Session
    pairs: Dataset
    truth: Mapping[str, Sequence[bool]]
    detectors: Mapping[str, list[int]]
    single: Mapping[str, Any]
    n_sweep: int
    n_mirror: int
    load_model: Callable[[], Any]
    train: Callable[[Dataset, Path], Path]


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
        {name: single_pairs(name, 400, f"single-{seed}") for name in PLANTED},
        n_sweep=400,
        n_mirror=400,
        load_model=creature.load_model,
        train=lambda pairs, folder: train(pairs, folder, seed),
    )


def smollm2_world(seed: int, model_dir: Path) -> World:
    """SmolLM2 with pairs about countries; detectors are told on 100 balanced pairs."""
    import smollm2
    import smollm2_study

    smollm2.require_packages()
    batch_size = 8
    sizes = {"steps": N_PAIRS // batch_size, "test_pairs": 0, "contrast_pairs": 0}
    sizes |= {"batch_size": batch_size, "detector_pairs": 100, "model_dir": model_dir}
    world = smollm2_study.World(argparse.Namespace(**sizes), "data", seed)
    # A model of its own: the other one is trained.
    model = smollm2.attach_probe(smollm2.load_base(world.folder), smollm2.LAYER, str(smollm2.SAE))
    session = Session(model, world.tokenizer, world.train, batch_size=batch_size, progress=True)
    means = smollm2.mean_over_answers(replace(session, dataset=world.detect))
    scores = smollm2.score_attributes(means, world.detect, world.knobs)
    facts, balanced = smollm2.load_facts(), dict.fromkeys(world.knobs, 0.5)
    _, held_out = smollm2.split_countries(facts)
    return World(
        session,
        world.train,
        {name: world.train[f"{name}_chosen"] for name in world.knobs},
        smollm2.find_detectors(scores),
        {
            name: smollm2.make_pairs(
                facts,
                held_out,
                N_SINGLE,
                **balanced | {name: 1.0},
                alone=name,
                seed=f"single-{seed}",
            )
            for name in world.knobs
        },
        n_sweep=len(world.train),
        n_mirror=64,
        load_model=lambda: smollm2.load_base(world.folder),
        train=lambda pairs, folder: train_gains(world, pairs, folder, seed),
    )


def study(seed: int, args: argparse.Namespace) -> Study:
    """Read the data of one seed, curate them, and train on each copy."""
    folder = args.out / f"{args.world}-{seed}"
    if args.world == "organism":
        world = organism_world(seed)
    else:
        world = smollm2_world(seed, args.model_dir)
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
    variants = [Variant(BASE, **measure_margins(world, world.load_model()))]
    for name in VARIANTS:
        if name not in copies:
            variants.append(Variant(name, 0))
            continue
        kept, pairs = copies[name]
        shares = {each: shares_of(truth, kept) for each, truth in world.truth.items()}
        variant = Variant(name, len(pairs), **shares)
        variants.append(measure_adapter(variant, world, pairs, folder))
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


def train_gains(world: Any, pairs: Dataset, folder: Path, seed: int) -> Path:
    """A gain for each feature, trained on these pairs, over and over, for as many steps as others.

    Args:
        world: SmolLM2, from examples/smollm2_study.py.
        pairs: in batches; these repeat.
        folder: where the adapter is saved, unless it was before.
        seed: of the order.
    """
    from smollm2 import LAYER, SAE
    from smollm2_study import BOUNDED, train, without_lower_layers

    output = folder / "adapter"
    # PEFT writes it last.
    if not (output / "adapter_config.json").exists():
        batches = world.batches(pairs.shuffle(seed=seed))
        place = {"layer": LAYER, "sae": str(SAE), "task_type": "CAUSAL_LM"}
        with without_lower_layers(world.model, LAYER, batches):
            peft = get_peft_model(world.model, FSRLConfig(**place, **BOUNDED.config))
            train(world, peft, BOUNDED, list(itertools.islice(itertools.cycle(batches), N_STEPS)))
            peft.save_pretrained(output)
            peft.unload()
    return output


def measure_margins(world: World, model: Any) -> dict[str, Interval]:
    """How much a model prefers each attribute where nothing else differs."""
    margins = {}
    for attribute, rows in world.single.items():
        scores = score_preferences(replace(world.session, model=model, dataset=rows))
        margins[f"{attribute}_margin"] = mean_interval(scores.margins)
    return margins


def measure_adapter(variant: Variant, world: World, pairs: Dataset, folder: Path) -> Variant:
    """Train one on a copy; what it prefers where nothing else differs, and which data it mirrors.

    Args:
        variant: what is known of the copy.
        world: with the data as given.
        pairs: the copy.
        folder: of the seed; what was read of the data as given is in it.
    """
    adapter = world.train(pairs, folder / variant.name)
    model = PeftModel.from_pretrained(world.load_model(), adapter).eval()
    mirrors = {}
    for name, data in {GIVEN: world.pairs, variant.name: pairs}.items():
        some = list(data.select(range(min(world.n_mirror, len(data)))))
        session = replace(world.session, model=model, dataset=some)
        parts = folder / "parts" if name == GIVEN else folder / name / "parts"
        mirrors[name] = compute_mirror(session, compute_usage(session), out=parts)
    return replace(
        variant,
        **measure_margins(world, model),
        explained_by_given=mirrors[GIVEN].explained,
        cosine_with_given=mirrors[GIVEN].cosine,
        explained_by_own=mirrors[variant.name].explained,
        cosine_with_own=mirrors[variant.name].cosine,
    )


def finished_study(seed: int, args: argparse.Namespace) -> Study:
    """The study of one seed, made now unless it was made before."""
    file = args.out / f"{args.world}-{seed}" / "study.json"
    if not file.exists():
        write_text_atomically(file, study(seed, args).to_json())
    return Study.from_json(file.read_text())


def render_recoveries(studies: Sequence[Study]) -> str:
    """Mean over seeds and the range, by knob and attribute, as Markdown."""
    names = list(dict.fromkeys(each.attribute for each in studies[0].recoveries))
    rows = ["| preferred in | " + " | ".join(f"{name}: AUROC | separate" for name in names) + " |"]
    rows.append("| --- |" + " --- | --- |" * len(names))
    for knob in KNOBS:
        cells = [f"{knob:.0%}"]
        for name in names:
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
        "courtesy": ("courtesy preferred in the data", ".1%"),
        "honesty": ("honesty preferred in the data", ".1%"),
        "style_margin": ("margin of the style", "+.2f"),
        "courtesy_margin": ("margin of courtesy", "+.2f"),
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


def half_precision() -> Any:
    """SmolLM2's bfloat16; its scripts are not needed for the organism."""
    import smollm2_study

    return smollm2_study.half_precision()


def main() -> None:
    """Make what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=("organism", "smollm2"), default="organism")
    parser.add_argument("--out", type=Path, default=Path("runs/data_study"))
    parser.add_argument("--model_dir", type=Path, default=Path("runs/smollm2/model"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with nullcontext() if args.world == "organism" else half_precision():
        studies = [finished_study(seed, args) for seed in args.seeds]
    text = f"{render_recoveries(studies)}\n\n{render_variants(studies, args.seeds)}\n"
    write_text_atomically(args.out / f"{args.world}.md", text)
    print(text)


if __name__ == "__main__":
    main()
