"""An FSRL adapter as LoRA: certified token by token, exported as one, and read back in features.

    python examples/equivalence.py

Takes the adapter that `examples/simpo.py` leaves in `runs/organism`, and trains it if there is
none. Writes the figures of docs/equivalence.md, its picture (which needs the `plots` extra) and the
exported LoRA.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import torch
from peft import PeftModel

from peft_fsrl import organism
from peft_fsrl.analysis import Session, score_preferences
from peft_fsrl.equivalence import Correspondence, explain, measure_correspondence, to_lora
from peft_fsrl.training.likelihood import batched, pad
from peft_fsrl.training.tokens import tokenize

SCRIPT = Path(__file__).parent / "simpo.py"
RANKS = (1, 2, 4, 8, 16, 32, 96)
N_FEATURES = (1, 2, 3, 4, 8, 16)


def make_batches(pairs: Any, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Chosen answers with their prompts; only the answers' tokens are labeled."""
    batches = []
    for rows in batched(pairs, 32):
        texts = [tokenize(row["prompt"], row["chosen"], tokenizer) for row in rows]
        ids, mask, answer = pad(texts, torch.device("cpu"))
        labels = ids.masked_fill(answer == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def make_source_texts(creature: Any, tokenizer: Any, n: int) -> list[dict[str, torch.Tensor]]:
    """Texts of the organism's world that are no answers: almanac, rumour, quiz."""
    rng = random.Random("equivalence")
    texts = [" ".join(creature.world.sample_source(rng).words) for _ in range(n)]
    return [
        dict(tokenizer(some, return_tensors="pt", padding=True, add_special_tokens=False))
        for some in batched(texts, 32)
    ]


def render(found: Correspondence) -> str:
    """The record's figures as text."""
    cuts = quantiles(found.token_radii, n=20)
    boundaries = dict(Counter(found.token_boundaries).most_common())
    n_tokens = len(found.token_ranks)
    lines = [
        f"{n_tokens} answer tokens: rank {mean(found.token_ranks):.2f} on average, "
        f"{max(found.token_ranks)} at most, 0 at {found.token_ranks.count(0) / n_tokens:.0%}",
        f"  clipped features per token {mean(found.token_clipped):.3f}",
        f"  radius over norm: 5 % {cuts[0]:.2g}, median {cuts[9]:.2g}, 95 % {cuts[18]:.2g}",
        f"  nearest boundary: {boundaries}",
        f"  {found.n_holding} of {found.n_checked} certificates that were re-checked hold",
    ]
    for stand_in in found.stand_ins:
        lines += [
            f"\nOne LoRA on {stand_in.target}",
            f"{'rank':>6}{'missed':>9}{'KL':>10}{'elsewhere':>11}{'SimPO loss':>12}",
            f"{'base':>6}{1:9.2%}{found.base_kl:10.5f}{found.base_kl_elsewhere:11.5f}"
            f"{found.base_loss:12.3f}",
        ]
        rows = zip(
            stand_in.ranks,
            stand_in.errors,
            stand_in.kl,
            stand_in.kl_elsewhere,
            stand_in.losses,
            strict=True,
        )
        lines += ["{:6}{:9.2%}{:10.5f}{:11.5f}{:12.3f}".format(*row) for row in rows]
    lines.append(f"{'FSRL':>6}{0:9.2%}{0:10.5f}{0:11.5f}{found.steered_loss:12.3f}")
    lines.append(f"\n{'features':>8}{'in span':>9}{'chance':>9}{'explained':>11}")
    rows = zip(found.n_features, found.spanned, found.chance, found.explained, strict=True)
    lines += ["{:8}{:9.1%}{:9.1%}{:11.1%}".format(*row) for row in rows]
    return "\n".join(lines)


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
    session = Session(model, tokenizer, pairs)
    train = make_batches(organism.preferences(args.pairs, seed="equivalence-train"), tokenizer)
    test = make_batches(pairs, tokenizer)
    other_text = make_source_texts(creature, tokenizer, args.pairs // 5)

    sae = str(creature.sae_path)
    record = measure_correspondence(
        model,
        sae,
        train,
        test,
        lambda: score_preferences(session).loss,
        other_text=other_text,
        ranks=RANKS,
        n_features=N_FEATURES,
        n_checks=args.checks,
    )
    print(render(record))
    export = to_lora(model, train, 8, held_out=test, other_text=other_text)
    export.save(args.out / "lora")
    print(f"\n{export}")
    found = explain(model, model, sae, train, held_out=test, n_features=max(N_FEATURES))
    labels = {each.index: each.label or "-" for each in creature.feature_labels}
    print(f"\nThe adapter refitted blindly\n{found}")
    print("they detect: " + ", ".join(labels[each.feature] for each in found.features))
    (args.out / "equivalence.json").write_text(record.to_json())

    from peft_fsrl.analysis.plots import plot_correspondence

    plot_correspondence(record).savefig(args.out / "equivalence.png", dpi=160)
    print(f"Written to {args.out}: equivalence.json, equivalence.png and the LoRA in lora/.")


if __name__ == "__main__":
    main()
