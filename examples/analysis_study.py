"""Do the analyses find what was planted in the model organism, and do their intervals hold?

    python examples/organism_study.py      # trains the six adapters, if they are not there
    python examples/analysis_study.py

Every analysis is made on 400 held-out pairs for each adapter of the study. The figures that have an
interval are then measured once more on ten times as many fresh pairs, made with the same knobs by
another seed, which stand for the truth: of intervals at 95 %, about that share should cover it.
Runs that have finished are kept. Writes the tables that docs/organism.md shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from organism_study import SETTINGS, run_folder
from peft import PeftModel

from peft_fsrl import organism
from peft_fsrl.analysis import (
    Ablation,
    Composition,
    FeatureAblations,
    Interval,
    Record,
    Robustness,
    Session,
    StaticDynamic,
    compare_static_dynamic,
    composition_of,
    compute_compositions,
    compute_gain,
    compute_usage,
    count_features,
    measure_categories,
    measure_features,
    score_preferences,
)
from peft_fsrl.analysis.labels import (
    error_rates_for_mcc,
    organism_labels,
    propagate_ablation,
    propagate_composition,
)
from peft_fsrl.files import write_text_atomically
from peft_fsrl.steering import ablate_features

CATEGORIES = ("style", "honesty")
# Of the paper's LLM judge against human labels.
PAPER_MCC = 0.448
REWARDED = dict(zip(SETTINGS, CATEGORIES, strict=True))


@dataclass(frozen=True)
class Check(Record):
    """A figure from few pairs, and the same from many fresh ones."""

    name: str
    measured: Interval
    truth: float

    @property
    def covered(self) -> bool:
        """Whether the interval holds the figure from many pairs."""
        return self.measured.low <= self.truth <= self.measured.high


@dataclass(frozen=True)
class Study(Record):
    """What the analyses say about one adapter, and what more data say of their figures."""

    compositions: tuple[Composition, ...]
    ablations: tuple[Ablation, ...]
    single: FeatureAblations
    static_dynamic: StaticDynamic
    robustness: tuple[Robustness, ...]
    checks: tuple[Check, ...]


def study(setting: str, seed: int, folder: Path, n_pairs: int, n_truth: int) -> Study:
    """Analyze one adapter on held-out pairs, and check the intervals on fresh ones."""
    creature = organism.load()
    model = PeftModel.from_pretrained(creature.load_model(), run_folder(folder, setting, seed))
    tokenizer = creature.load_tokenizer()
    knobs = {"style": 0.55, "honesty": 0.55} | {REWARDED[setting]: 0.9}
    few = organism.preferences(n_pairs, seed=f"analysis-{seed}", **knobs)
    many = organism.preferences(n_truth, seed=f"truth-{seed}", **knobs)
    categories = {name: creature.features(name) for name in CATEGORIES}
    label = f"{setting}, seed {seed}:"

    session = Session(model, tokenizer, few, progress=True)
    truth = replace(session, dataset=many)
    with session.base():
        base, base_truth = score_preferences(session), score_preferences(truth)
    trained, trained_truth = score_preferences(session), score_preferences(truth)
    usage = compute_usage(session)
    ablations = measure_categories(session, categories, usage, trained=trained)
    compositions = compute_compositions(session, categories)
    checks = [
        Check("gain", compute_gain(base, trained), base_truth.loss - trained_truth.loss),
        *composition_checks(compositions, count_features(truth), categories),
    ]
    for ablation in ablations:
        with ablate_features(model, ablation.features):
            without = score_preferences(truth)
        rises = {
            "loss": (ablation.rise, without.loss - trained_truth.loss),
            "accuracy": (ablation.accuracy_rise, without.accuracy - trained_truth.accuracy),
            "margin": (ablation.margin_rise, without.margin - trained_truth.margin),
        }
        checks += [
            Check(f"{figure} without {ablation.name}", *pair) for figure, pair in rises.items()
        ]
    return Study(
        compositions,
        ablations,
        measure_features(session, usage, trained=trained, n_features=10),
        compare_static_dynamic(session, usage, base=base, trained=trained),
        robustness(session, f"{label} relabeled"),
        tuple(checks),
    )


def robustness(session: Session, text: str) -> tuple[Robustness, ...]:
    """The true labels, treated as if they were no better than the paper's judge."""
    labels = organism_labels(organism.load())
    labels = replace(labels, categories=CATEGORIES)
    n_features = len(labels.features)
    rates = [
        error_rates_for_mcc(
            name, PAPER_MCC, judged_share=len(labels.members(name)) / n_features, n=n_features
        )
        for name in CATEGORIES
    ]
    counts = count_features(session, segments=["prompt_chosen"])
    some = replace(session, dataset=session.rows[:100], progress=False)
    whole = score_preferences(some)

    def rise(features: Sequence[int]) -> float:
        with ablate_features(session.model, features):
            return score_preferences(some).loss - whole.loss

    composition = propagate_composition(labels, rates, counts.values())
    return composition + propagate_ablation(labels, rates, rise, n_draws=40, progress=True)


def composition_checks(
    compositions: Sequence[Composition],
    truth: Mapping[str, Any],
    categories: Mapping[str, Sequence[int]],
) -> Iterator[Check]:
    """Shares and enrichments of each segment against those among many more texts."""
    for composition in compositions:
        shares = composition_of(truth[composition.segment], categories)
        for entry in composition.shares:
            true, place = shares[entry.category], f"{entry.category}, {composition.segment}"
            yield Check(f"share steered {place}", entry.steered_share, true.steered_share)
            yield Check(f"share active {place}", entry.active_share, true.active_share)
            yield Check(f"enrichment {place}", entry.enrichment, true.enrichment)


def finished_study(setting: str, seed: int, args: argparse.Namespace) -> Study:
    """The study of one adapter, made now unless it was made before."""
    file = run_folder(args.runs, setting, seed) / "analysis_study.json"
    if not file.exists():
        record = study(setting, seed, args.runs, args.pairs, args.truth_pairs)
        write_text_atomically(file, record.to_json())
    return Study.from_json(file.read_text())


def render_table(studies: dict[str, list[Study]], seeds: Sequence[int]) -> str:
    """One row per figure and setting, one column per seed, as Markdown."""

    def cell(interval: Interval | None, form: str) -> str:
        if interval is None:
            return "-"
        return f"{interval.value:{form}} ({interval.low:{form}} to {interval.high:{form}})"

    header = ["data", "figure", *(f"seed {seed}" for seed in seeds)]
    rows = []
    for setting, runs in studies.items():

        def add(figure: str, cells: Sequence[str], setting: str = setting) -> None:
            rows.append([setting, figure, *cells])

        for place, name in enumerate(CATEGORIES):
            on_chosen = [
                next(c for c in run.compositions if c.segment == "prompt_chosen").shares[place]
                for run in runs
            ]
            add(f"enrichment of {name}", [cell(share.enrichment, ".2f") for share in on_chosen])
            mine = [run.ablations[place] for run in runs]
            add(f"rise without {name}", [cell(a.rise, "+.3f") for a in mine])
            add("... over as many random ones", [cell(a.excess_count, "+.3f") for a in mine])
            add("... over random ones of equal mass", [cell(a.excess_mass, "+.3f") for a in mine])
        rewarded = set(organism.load().features(REWARDED[setting]))
        add(
            f"of the 10 largest single effects, features of {REWARDED[setting]}",
            [str(len(rewarded & {f.feature for f in run.single.features[:10]})) for run in runs],
        )
        add(
            "rank correlation, estimate and measured",
            [f"{run.single.rank_correlation:.2f}" for run in runs],
        )
        add("features for 90 % of the gain, per token", [enough(r, "dynamic") for r in runs])
        add("features for 90 % of the gain, fixed", [enough(r, "static") for r in runs])
        for name in (
            "enrichment of style less that of honesty, prompt_chosen",
            "rise without style less rise without honesty",
        ):
            found = [next(r for r in run.robustness if r.figure == name) for run in runs]
            add(
                f"{name.replace(', prompt_chosen', '')}, by labels of MCC {PAPER_MCC}",
                [f"{cell(r.propagated, '+.2f')}, {r.kept:.0%} as measured" for r in found],
            )
        add("intervals that cover", [coverage(run.checks) for run in runs])
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]
    )


def enough(run: Study, policy: str) -> str:
    """The smallest number of features tried that keeps nine tenths of the gain."""
    record = run.static_dynamic
    wanted = record.base_loss - 0.9 * (record.base_loss - record.learned.loss.value)
    found = [level for level in getattr(record, policy) if level.loss.value <= wanted]
    return str(min(level.n_features for level in found)) if found else "more than tried"


def coverage(checks: Sequence[Check]) -> str:
    """How many intervals cover what more data say."""
    return f"{sum(check.covered for check in checks)} of {len(checks)}"


def main() -> None:
    """Make what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/organism_study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--truth_pairs", type=int, default=4000)
    args = parser.parse_args()
    studies = {
        setting: [finished_study(setting, seed, args) for seed in args.seeds]
        for setting in SETTINGS
    }
    table = render_table(studies, args.seeds)
    every = [check for runs in studies.values() for run in runs for check in run.checks]
    text = f"{table}\n\nOf all intervals, {coverage(every)} cover.\n"
    missed = [check for check in every if not check.covered]
    text += "".join(
        f"- {c.name}: {c.measured.low:.4g} to {c.measured.high:.4g}, {c.truth:.4g}\n"
        for c in missed
    )
    (args.runs / "analysis.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
