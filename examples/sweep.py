r"""The two-stage sweep of the paper: penalties at one layer, then layers at one penalty.

    python examples/sweep.py

sweeps the model organism. Any other model, with one SAE per layer, and every option that
`examples/simpo.py` takes:

    python examples/sweep.py --config examples/configs/gemma2_2b_ultrafeedback.yaml \
        --sae "gemma-scope-2b-pt-res-canonical/layer_{layer}/width_65k/canonical" \
        --layer 12 --layers 6 12 18 24 --l1_coeffs 0.03 0.1 0.3 --launcher "accelerate launch"

Each run is `examples/simpo.py` in a process and a folder of its own. The table, `sweep.csv`, is
written after each; the pictures are drawn from it. Started again, the sweep goes on where it was
stopped: what has finished is not run again, and a run that was stopped goes on from its last
checkpoint if it left one.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft_fsrl import organism
from peft_fsrl.analysis import SweepPoint, load_sweep, save_sweep
from peft_fsrl.training import complete_checkpoints

SCRIPT = Path(__file__).parent / "simpo.py"
BUILDER = Path(__file__).parents[1] / "tools" / "organism"
FIGURES = {
    "loss": "eval_loss",
    "accuracy": "eval_rewards/accuracies",
    "l0": "eval_fsrl/l0",
    "l1": "eval_fsrl/l1",
    "perplexity": "eval_coherence/perplexity",
    "perplexity_unsteered": "eval_coherence/perplexity_unsteered",
    "repetition": "eval_coherence/repetition",
    "distinct_2": "eval_coherence/distinct_2",
}


class Table:
    """The runs of one sweep, in `folder/sweep.csv`; each is done once."""

    def __init__(self, folder: Path, launcher: Sequence[str], shared: Sequence[str] = ()) -> None:
        self.folder = folder
        self.path = folder / "sweep.csv"
        self._launcher = launcher
        self._shared = shared
        found = load_sweep(self.path) if self.path.exists() else ()
        self.points = {(point.stage, point.name): point for point in found}

    def run(self, stage: str, layer: int, seed: int, options: Mapping[str, object]) -> SweepPoint:
        """One run, made now unless it was made before; other options are another run."""
        chosen = {"layer": layer, **options, "seed": seed}
        flags = list(self._shared)
        for name, value in chosen.items():
            several = isinstance(value, list | tuple)
            flags += [f"--{name}", *map(str, value)] if several else [f"--{name}={value}"]
        digest = hashlib.sha256(shlex.join(flags).encode()).hexdigest()[:8]
        name = f"layer{layer}-seed{seed}-{digest}"
        point = self.points.get((stage, name))
        if point is None or not point.finished:
            # The same run may belong to several stages.
            twins = [twin for twin in self.points.values() if twin.name == name and twin.finished]
            point = replace(twins[0], stage=stage) if twins else self._make(stage, name, flags)
            self.points[stage, name] = point
            save_sweep(self.path, self.points.values())
        return point

    def _make(self, stage: str, name: str, flags: Sequence[str]) -> SweepPoint:
        command = [*self._launcher, str(SCRIPT), *flags, f"--output_dir={self.folder / name}"]
        seconds = self._train(name, command)
        figures = self._figures(name)
        given = dict(flag.removeprefix("--").split("=", 1) for flag in flags if "=" in flag)
        return SweepPoint(
            stage=stage,
            name=name,
            layer=int(given["layer"]),
            seed=int(given["seed"]),
            l1_coeff=float(given["l1_coeff"]),
            l0_coeff=float(given.get("l0_coeff", 0.0)),
            seconds=seconds,
            command=shlex.join(command),
            **{field: figures.get(key) for field, key in FIGURES.items()},
        )

    def _train(self, name: str, command: Sequence[str]) -> float | None:
        """Wall time of a run; None where the sweep was stopped between the run and its row."""
        log = self.folder / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            # Whoever writes to the log holds the lock: also a run whose sweep was killed.
            fcntl.flock(file, fcntl.LOCK_EX)
            if self._figures(name):
                return None
            if complete_checkpoints(self.folder / name):
                command = [*command, "--resume_from_checkpoint=true"]
            file.truncate(0)
            started = time.monotonic()
            subprocess.run([*command, "--overwrite_output=true"], stdout=file, stderr=file)
            return round(time.monotonic() - started, 3)

    def _figures(self, name: str) -> dict[str, float]:
        """What a run wrote as its last act; empty where it did not come to that."""
        return read_json(self.folder / name / "eval_results.json")

    def failed(self) -> list[SweepPoint]:
        """Runs without figures."""
        return [point for point in self.points.values() if not point.finished]


def read_json(path: Path) -> dict[str, float]:
    """What a file holds; empty where there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def organism_sae(layer: int, folder: Path) -> Path:
    """An SAE of the organism at any layer: the one that ships, or one trained now, like it."""
    creature = organism.load()
    if layer == creature.layer:
        return creature.sae_path
    path = folder / "saes" / f"layer_{layer}"
    if not path.exists():
        sys.path.insert(0, str(BUILDER))
        import torch

        from dictionary import DictionarySettings, train_dictionary

        settings = DictionarySettings(**{**creature.manifest["sae"], "layer": layer})
        print(f"training an SAE of layer {layer} on {settings.samples:,} activations ...")
        unfinished = path.with_name(f".{path.name}.tmp")
        torch.manual_seed(creature.manifest["seed"])
        train_dictionary(
            creature.load_model(),
            creature.world,
            settings,
            creature.manifest["seed"],
            unfinished,
            f"peft_fsrl/organism-{creature.manifest['size']}",
        )
        os.replace(unfinished, path)
    return path


def describe(point: SweepPoint) -> str:
    """A line about a run."""
    if not point.finished:
        return f"{point.name}: FAILED, see logs/{point.name}.txt"
    perplexity = "" if point.perplexity is None else f", perplexity {point.perplexity:.2f}"
    return (
        f"layer {point.layer}, l1_coeff {point.l1_coeff:g}, seed {point.seed}: "
        f"loss {point.loss:.3f}, l0 {point.l0:.2f}{perplexity}"
    )


def main() -> int:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--l1_coeffs", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--layer", type=int, help="where the coefficients are swept")
    parser.add_argument("--layers", type=int, nargs="+", help="all to compare")
    parser.add_argument("--l1_coeff", type=float, default=0.1, help="at which layers are compared")
    parser.add_argument("--sae", help="a reference with {layer} in it; the organism has its own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--launcher", default=shlex.quote(sys.executable))
    args, others = parser.parse_known_args()
    if args.sae is None:
        args.layer = organism.load().layer if args.layer is None else args.layer
        args.layers = [0, 1, 2, 3] if args.layers is None else args.layers
    elif "{layer}" not in args.sae or args.layer is None or args.layers is None:
        parser.error("with --sae, which must contain {layer}, give --layer and --layers")

    table = Table(args.out, shlex.split(args.launcher), others)
    grid = [("coefficients", args.layer, l1_coeff) for l1_coeff in args.l1_coeffs]
    grid += [("layers", layer, args.l1_coeff) for layer in args.layers]
    runs = [(*where, seed) for where in grid for seed in args.seeds]
    for number, (stage, layer, l1_coeff, seed) in enumerate(runs, start=1):
        sae = organism_sae(layer, args.out) if args.sae is None else args.sae.format(layer=layer)
        print(f"[{number}/{len(runs)}] ", end="", flush=True)
        print(describe(table.run(stage, layer, seed, {"sae": sae, "l1_coeff": l1_coeff})))
    draw(table.path)
    print(f"The table is {table.path}, with pictures beside it.")
    return 1 if table.failed() else 0


def draw(path: Path) -> None:
    """The two pictures, from the table alone; needs the `plots` extra."""
    from peft_fsrl.analysis.plots import plot_sweep

    points = load_sweep(path)
    for stage in ("coefficients", "layers"):
        chosen = [point for point in points if point.stage == stage]
        if any(point.finished for point in chosen):
            x = {"coefficients": "l1_coeff", "layers": "layer"}[stage]
            plot_sweep(chosen, x).savefig(path.with_name(f"{stage}.png"), dpi=160)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped: start again to go on")
