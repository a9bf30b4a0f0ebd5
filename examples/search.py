"""Search both kinds of sparsity with the same care: L1 on a soft threshold, L0 on a jump.

    python examples/search.py

A study per family, with as many trials for each and the same sampler (Optuna's TPE; the `sweep`
extra), minimizes two things at once: held-out loss and steered features per token. No weight and no
target has to be chosen for that, and the fronts can be compared at any sparsity. Then the best
trial of each family that steers no more than `--target_l0` features per token is trained again with
seeds that the search has not seen: what was picked as the best of many looks better than it is.

Each trial is `examples/simpo.py` in a process of its own, a row of `sweep.csv`, and a record of
`study.log`. Started again, the search goes on where it was stopped, with the trials that it would
have made anyway. Options that are not listed below go to `examples/simpo.py`.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sweep import Table, organism_sae

from peft_fsrl import organism
from peft_fsrl.analysis import SweepPoint


@dataclass(frozen=True)
class Family:
    """One kind of sparsity: the range of each setting, and where the search begins.

    Args:
        ranges: low and high of each searched setting, on a logarithmic scale.
        first: the first trial.
        flags: options of a run that follow from the settings.
    """

    ranges: dict[str, tuple[float, float]]
    first: dict[str, float]
    flags: Callable[[dict[str, float]], dict[str, object]]


FAMILIES = {
    "soft_threshold": Family(
        ranges={
            "l1_coeff": (0.01, 1.0),
            "learning_rate": (1e-3, 2e-2),
            "threshold_lr_multiplier": (0.1, 10.0),
        },
        first={"l1_coeff": 0.1, "learning_rate": 5e-3, "threshold_lr_multiplier": 1.0},
        flags=lambda settings: settings,
    ),
    "jumprelu": Family(
        ranges={
            "l0_coeff": (1e-3, 0.5),
            "learning_rate": (1e-3, 2e-2),
            "threshold_lr_multiplier": (1.0, 100.0),
            "init_threshold": (1e-3, 0.3),
            "jumprelu_bandwidth": (1e-2, 3.0),
        },
        first={
            "l0_coeff": 0.05,
            "learning_rate": 5e-3,
            "threshold_lr_multiplier": 10.0,
            "init_threshold": 0.05,
            "jumprelu_bandwidth": 0.5,
        },
        # A gate that is closed everywhere passes no gradient to the weight behind it, ever: the
        # start has to be as large as the threshold.
        flags=lambda settings: {
            **settings,
            "l1_coeff": 0.0,
            "init_scale": settings["init_threshold"],
        },
    ),
}


class Search:
    """Trials of one family.

    Args:
        family: key of `FAMILIES`.
        table: where the runs are.
        fixed: options of every run.
        layer: the steered layer.
        seed: of the sampler and of every run.
    """

    def __init__(
        self, family: str, table: Table, fixed: dict[str, object], layer: int, seed: int
    ) -> None:
        self.family = family
        self._table, self._fixed, self._layer, self._seed = table, fixed, layer, seed
        storage = JournalStorage(JournalFileBackend(str(table.folder / "study.log")))
        self.study = optuna.create_study(
            study_name=family,
            storage=storage,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        if not self.study.trials:
            self.study.enqueue_trial(FAMILIES[family].first)
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            # Stopped in the middle. Its run is found again by its settings.
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.study.enqueue_trial(trial.params)

    def make(self, trials: int) -> None:
        """Trials until there are so many."""
        while (done := len(self.trials)) < trials:
            # From the number of the trial, so that a search goes on as if it had not been stopped.
            self.study.sampler = optuna.samplers.TPESampler(
                seed=1000 * self._seed + done, n_startup_trials=max(3, trials // 3)
            )
            trial = self.study.ask()
            settings = {
                name: trial.suggest_float(name, low, high, log=True)
                for name, (low, high) in FAMILIES[self.family].ranges.items()
            }
            point = self.run("search", self._seed, settings)
            if not point.finished:
                self.study.tell(trial, state=TrialState.FAIL)
                raise SystemExit(f"{point.name} failed, see logs/{point.name}.txt")
            self.study.tell(trial, [point.loss, math.log2(1 + point.l0)])
            print(f"{self.family} {done + 1}/{trials}: loss {point.loss:.3f}, l0 {point.l0:.2f}")

    @property
    def trials(self) -> list[FrozenTrial]:
        """Those that have figures."""
        return self.study.get_trials(states=[TrialState.COMPLETE])

    def run(self, stage: str, seed: int, settings: dict[str, float]) -> SweepPoint:
        """One run with these settings."""
        rounded = {name: float(f"{value:.4g}") for name, value in settings.items()}
        flags = {"activation": self.family, **FAMILIES[self.family].flags(rounded)}
        return self._table.run(f"{stage} {self.family}", self._layer, seed, self._fixed | flags)

    def best(self, l0: float) -> FrozenTrial | None:
        """The trial of the lowest loss among those that steer no more features than `l0`."""
        limit = math.log2(1 + l0)
        allowed = [trial for trial in self.trials if trial.values[1] <= limit]
        return min(allowed, key=lambda trial: trial.values[0], default=None)


def render_fronts(searches: Sequence[Search], l0s: Sequence[float]) -> str:
    """Lowest loss of each family with no more than so many features, as a Markdown table."""
    rows = ["| l0 at most | " + " | ".join(search.family for search in searches) + " |"]
    rows.append("| --- |" + " --- |" * len(searches))
    for l0 in l0s:
        cells = []
        for search in searches:
            best = search.best(l0)
            found = None if best is None else (best.values[0], 2 ** best.values[1] - 1)
            cells.append("-" if found is None else f"{found[0]:.3f} (l0 {found[1]:.2f})")
        rows.append(f"| {l0:g} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def render_confirmation(runs: dict[str, tuple[dict[str, Any], list[SweepPoint]]]) -> str:
    """The chosen settings on fresh seeds, mean and standard deviation, as a Markdown table."""
    figures = ("loss", "l0", "accuracy", "perplexity", "repetition")
    rows = ["| family | settings | " + " | ".join(figures) + " |"]
    rows.append("| --- | --- |" + " --- |" * len(figures))
    for family, (settings, points) in runs.items():
        cells = [", ".join(f"{name} {value:.3g}" for name, value in settings.items())]
        for name in figures:
            values = [value for point in points if (value := getattr(point, name)) is not None]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}" if values else "-")
        rows.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> int:
    """Search, compare, confirm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--trials", type=int, default=20, help="of each family")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--target_l0", type=float, default=4.0)
    parser.add_argument("--confirm_seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--layer", type=int)
    parser.add_argument("--sae", help="without it, the organism's")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--launcher", default=shlex.quote(sys.executable))
    args, others = parser.parse_known_args()
    if args.sae is not None and args.layer is None:
        parser.error("with --sae, give --layer")
    layer = organism.load().layer if args.layer is None else args.layer
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(args.out, shlex.split(args.launcher), others)
    fixed: dict[str, object] = {"sae": args.sae or organism_sae(layer, args.out)}
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    searches = [Search(family, table, fixed, layer, args.seed) for family in args.families]
    for search in searches:
        search.make(args.trials)
    chosen = {
        search: best for search in searches if (best := search.best(args.target_l0)) is not None
    }
    confirmed = {
        search.family: (
            best.params,
            [search.run("confirm", seed, best.params) for seed in args.confirm_seeds],
        )
        for search, best in chosen.items()
    }
    fronts = render_fronts(searches, [args.target_l0 * factor for factor in (0.25, 0.5, 1, 2, 4)])
    text = f"{fronts}\n\n{render_confirmation(confirmed)}\n"
    (args.out / "tables.md").write_text(text)
    print(f"\n{text}\nThe table of all runs is {table.path}.")
    return 1 if table.failed() else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped: start again to go on")
