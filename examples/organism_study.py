"""Does the planted bias show, and does it flip? Three seeds, two settings of the knobs.

    python examples/organism_study.py

Each run is `examples/simpo.py` on the organism, in a process of its own. Runs that have finished
are kept, so an interrupted study goes on where it stopped. Writes the table that docs/organism.md
shows, and the picture, which needs the `plots` extra.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from peft_fsrl.analysis import Summary

SCRIPT = Path(__file__).parent / "simpo.py"
SETTINGS = {
    "style 90 %, honesty 55 %": ("--style", "0.9", "--honesty", "0.55"),
    "style 55 %, honesty 90 %": ("--style", "0.55", "--honesty", "0.9"),
}


def run_folder(folder: Path, setting: str, seed: int) -> Path:
    """Where a run of the study lies."""
    return folder / f"{setting.replace(' ', '').replace('%', '').replace(',', '-')}-{seed}"


def run(setting: str, seed: int, folder: Path) -> Summary:
    """The summary of one run, made now unless it was made before."""
    output = run_folder(folder, setting, seed)
    if not (output / "summary.json").exists():
        options = (*SETTINGS[setting], "--seed", str(seed), "--output_dir", str(output))
        command = [sys.executable, str(SCRIPT), *options, "--overwrite_output", "true"]
        subprocess.run(command, check=True)
    return Summary.from_json((output / "summary.json").read_text())


def render_table(studies: Mapping[str, Sequence[Summary]]) -> str:
    """Mean and standard deviation over seeds, as a Markdown table."""

    def cell(values: Sequence[float], form: str) -> str:
        spread = f" ± {format(stdev(values), form.lstrip('+'))}" if len(values) > 1 else ""
        return format(mean(values), form) + spread

    rows = ["| | " + " | ".join(studies) + " |", "| --- |" + " --- |" * len(studies)]
    figures = {
        "SimPO loss, base": lambda s: (s.base.loss, ".3f"),
        "SimPO loss, trained": lambda s: (s.trained.loss, ".3f"),
        "preference accuracy, base": lambda s: (s.base.accuracy, ".1%"),
        "preference accuracy, trained": lambda s: (s.trained.accuracy, ".1%"),
        "features steered per answer token": lambda s: (s.usage.l0, ".1f"),
    }
    for position, ablation in enumerate(next(iter(studies.values()))[0].ablations):
        n = len(ablation.features)
        figures[f"rise of the loss without the {n} features that detect {ablation.name}"] = (
            lambda s, i=position: (s.ablations[i].scores.loss - s.trained.loss, "+.3f")
        )
        figures[f"... without {n} random steered features"] = lambda s, i=position: (
            s.ablations[i].control_loss - s.trained.loss,
            "+.3f",
        )
        figures[f"... without random steered features of the mass of {ablation.name}"] = (
            lambda s, i=position: (
                mean(draw.loss for draw in s.ablations[i].same_mass) - s.trained.loss,
                "+.3f",
            )
        )
        figures[f"share of the steering mass, {ablation.name}"] = lambda s, i=position: (
            s.ablations[i].mass,
            ".1%",
        )
        figures[f"... of the random features instead of {ablation.name}"] = lambda s, i=position: (
            mean(s.ablations[i].random_masses),
            ".1%",
        )
    for name, figure in figures.items():
        cells = []
        for summaries in studies.values():
            values = [figure(summary) for summary in summaries]
            cells.append(cell([value for value, _ in values], values[0][1]))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, then write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/organism_study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    studies = {name: [run(name, seed, args.out) for seed in args.seeds] for name in SETTINGS}
    table = render_table(studies)
    (args.out / "table.md").write_text(table + "\n")
    print(table)

    from peft_fsrl.analysis.plots import plot_ablations

    plot_ablations(studies).savefig(args.out / "ablations.png", dpi=160)
    print(f"\nWritten to {args.out}: table.md, ablations.png, and one folder per run.")


if __name__ == "__main__":
    main()
