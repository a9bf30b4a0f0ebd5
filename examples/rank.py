"""Rank the layers of the model organism before any training, and compare with a sweep.

    python examples/sweep.py && python examples/rank.py

One pass over some preference pairs gives the first-order effect of steering at every layer. Where
`sweep.csv` is in the folder, what training came to at each layer stands beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sweep import organism_sae

from peft_fsrl import organism
from peft_fsrl.analysis import Session, load_sweep, probe_layers, rank_layers


def main() -> None:
    """Rank, compare, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the sweep")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    creature = organism.load()
    session = Session(
        creature.load_model(),
        creature.load_tokenizer(),
        creature.preferences(args.pairs, seed=f"train-{args.seed}"),
        batch_size=16,
        progress=True,
    )
    effects = rank_layers(session, {layer: organism_sae(layer, args.out) for layer in args.layers})
    probes = {
        pooling: {p.layer: p for p in probe_layers(session, args.layers, pooling=pooling)}
        for pooling in ("last", "mean")
    }
    table = args.out / "sweep.csv"
    points = load_sweep(table) if table.exists() else ()
    trained = {point.layer: point for point in points if point.stage == "layers" and point.finished}
    names = ["layer", "probe, last token", "probe, mean of the answer"]
    names += ["per token", "constant", "best constant feature"]
    names += ["trained loss", "l1", "loss + penalty"] if trained else []
    print("| " + " | ".join(names) + " |")
    print("|" + " --- |" * len(names))
    for effect in effects:
        best = effect.features[0]
        cells = [f"{effect.layer}"]
        for found in probes.values():
            accuracy = found[effect.layer].accuracy
            cells.append(f"{accuracy.value:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%})")
        cells += [f"{effect.per_token:.2f}", f"{effect.constant:.3f}"]
        cells.append(f"{best.feature} ({best.slope:+.3f} ± {best.error:.3f})")
        point = trained.get(effect.layer)
        if point is not None:
            total = point.loss + point.l1_coeff * point.l1
            cells += [f"{point.loss:.3f}", f"{point.l1:.2f}", f"{total:.3f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
