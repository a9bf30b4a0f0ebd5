"""An FSRL adapter as LoRA: certified token by token, exported as one, and read back in features.

    python examples/equivalence.py

Takes the adapter that `examples/simpo.py` leaves in `runs/organism`, and trains it if there is
none. Writes the figures of docs/equivalence.md, its picture (which needs the `plots` extra) and the
exported LoRA.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import torch
from peft import PeftModel

from peft_fsrl import organism
from peft_fsrl.analysis import Correspondence, StandIn, score_preferences
from peft_fsrl.analysis.preferences import tokenize
from peft_fsrl.equivalence import (
    compare,
    explain,
    fit_single_lora,
    restricted_lora,
    stand_ins,
    to_lora,
)
from peft_fsrl.steering import scale_steering
from peft_fsrl.training.likelihood import pad

SCRIPT = Path(__file__).parent / "simpo.py"
RANKS = (1, 2, 4, 8, 16, 32, 96)
N_FEATURES = (1, 2, 3, 4, 8, 16)


def make_batches(rows: Any, tokenizer: Any, size: int = 32) -> list[dict[str, torch.Tensor]]:
    """Chosen answers with their prompts; only the answers' tokens are labelled."""
    batches = []
    for start in range(0, len(rows), size):
        chosen = rows.select(range(start, min(start + size, len(rows))))
        texts = [tokenize(row["prompt"], row["chosen"], tokenizer) for row in chosen]
        batch = pad(texts, torch.device("cpu"))
        labels = batch.input_ids.masked_fill(batch.answer_mask == 0, -100)
        batches.append(
            {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "labels": labels,
            }
        )
    return batches


def certify_tokens(model: Any, batches: Any, n_checks: int) -> tuple[list[int], list[float]]:
    """Certificates of every answer token; prints their figures, and re-checks some."""
    found = []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found += restricted_lora(model, inputs, tokens=batch["labels"] != -100)
    ranks = [each.rank for each in found]
    radii = [each.radius / float(each.x.norm()) for each in found]
    cuts = quantiles(radii, n=20)
    checked = found[:: max(1, len(found) // n_checks)]
    holding = sum(each.check().holds() for each in checked)
    print(f"{len(found)} answer tokens: rank {mean(ranks):.2f} on average, {max(ranks)} at most")
    print(f"  clipped features per token {mean(len(each.clipped) for each in found):.3f}")
    print(f"  radius over norm: 5 % {cuts[0]:.2g}, median {cuts[9]:.2g}, 95 % {cuts[18]:.2g}")
    print(f"  nearest boundary: {dict(Counter(each.boundary for each in found).most_common())}")
    print(f"  {holding} of {len(checked)} certificates that were re-checked hold to 1e-10")
    return ranks, radii


def measure_stand_ins(
    model: Any, train: Any, test: Any, pairs: Any, tokenizer: Any, target: str | None, name: str
) -> tuple[StandIn, float]:
    """One LoRA for all tokens at one place: error, divergence and SimPO loss against rank."""
    fitted = fit_single_lora(model, train, target=target)
    comparison = compare(model, test, stand_ins(fitted, RANKS))
    losses = []
    for rank in RANKS:
        with scale_steering(model, 0.0), fitted.applied(rank):
            losses.append(score_preferences(model, pairs, tokenizer).loss)
    kl = [comparison.models[f"LoRA of rank {rank}"].kl for rank in RANKS]
    errors = [fitted.error(rank) for rank in RANKS]
    print(f"\nOne LoRA on {name}\n{'rank':>6}{'missed':>9}{'KL':>10}{'SimPO loss':>12}")
    for row in zip(RANKS, errors, kl, losses, strict=True):
        print("{:6}{:9.2%}{:10.5f}{:12.3f}".format(*row))
    found = StandIn(name, RANKS, tuple(errors), tuple(kl), tuple(losses))
    return found, comparison.models["base"].kl


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, default=Path("runs/organism"))
    parser.add_argument("--out", type=Path, default=Path("runs/equivalence"))
    parser.add_argument("--pairs", type=int, default=1000, help="to fit on; a fifth to measure on")
    parser.add_argument("--checks", type=int, default=100, help="certificates to re-check")
    args = parser.parse_args()
    if not (args.adapter / "adapter_config.json").exists():
        command = [sys.executable, str(SCRIPT), "--output_dir", str(args.adapter)]
        subprocess.run([*command, "--overwrite_output", "true"], check=True)

    creature = organism.load()
    tokenizer = creature.load_tokenizer()
    model = PeftModel.from_pretrained(creature.load_model(), args.adapter).eval()
    pairs = organism.preferences(args.pairs // 5, seed="equivalence-test")
    train = make_batches(organism.preferences(args.pairs, seed="equivalence-train"), tokenizer)
    test = make_batches(pairs, tokenizer)

    ranks, radii = certify_tokens(model, test, args.checks)
    places = {None: "down_proj", "projection": "a projection"}
    measured = [
        measure_stand_ins(model, train, test, pairs, tokenizer, target, name)
        for target, name in places.items()
    ]
    export = to_lora(model, train, 8, held_out=test)
    export.save(args.out / "lora")
    print(f"\n{export}")

    spanned, explained = [], []
    for n_features in N_FEATURES:
        found = explain(
            creature.load_model(),
            model,
            str(creature.sae_path),
            train,
            held_out=test,
            n_features=n_features,
        )
        spanned.append(found.in_features.value)
        explained.append(found.explained.value)
    labels = {each.index: each.label or "-" for each in creature.feature_labels}
    print(f"\nThe adapter refitted blindly\n{found}")
    print("they detect: " + ", ".join(labels[each.feature] for each in found.features))

    with scale_steering(model, 0.0):
        base_loss = score_preferences(model, pairs, tokenizer).loss
    record = Correspondence(
        token_ranks=tuple(ranks),
        token_radii=tuple(radii),
        base_kl=measured[0][1],
        base_loss=base_loss,
        steered_loss=score_preferences(model, pairs, tokenizer).loss,
        stand_ins=tuple(stand_in for stand_in, _ in measured),
        n_features=N_FEATURES,
        spanned=tuple(spanned),
        explained=tuple(explained),
    )
    print(f"\nSimPO loss: base {record.base_loss:.3f}, steered {record.steered_loss:.3f}")
    (args.out / "equivalence.json").write_text(record.to_json())

    from peft_fsrl.analysis.plots import plot_correspondence

    plot_correspondence(record).savefig(args.out / "equivalence.png", dpi=160)
    print(f"Written to {args.out}: equivalence.json, equivalence.png and the LoRA in lora/.")


if __name__ == "__main__":
    main()
