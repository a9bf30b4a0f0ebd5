"""What it saves not to differentiate the frozen layers below the steered one.

    python benchmarks/frozen_prefix.py

A Llama of random weights takes training steps on random tokens under gradient checkpointing as TRL
sets it up (embeddings that require gradients), each in a process of its own: `plain` as it stands,
`cut` inside `without_prefix_graph`, as `with_fsrl` trainers do. Prints CPU time per step, the peak
memory of the process above what it held before the first step, and how far the gradients differ.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

WIDTH, LAYERS, D_SAE, VOCABULARY = 512, 12, 4096, 1000


def measure(layer: int, cut: bool, checkpointing: bool, steps: int) -> dict[str, Any]:
    """Take the steps in this process."""
    import torch
    from peft import get_peft_model
    from sae_lens import StandardSAE, StandardSAEConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_fsrl import FSRLConfig
    from peft_fsrl.steering import SteeringMonitor
    from peft_fsrl.training.penalty import SparsityPenalty
    from peft_fsrl.training.prefix import without_prefix_graph

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
    )
    sae = StandardSAE(StandardSAEConfig(d_in=WIDTH, d_sae=D_SAE))
    settings = FSRLConfig(layer=layer, sae=sae, init_scale=1e-2)
    model = get_peft_model(LlamaForCausalLM(config), settings).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    penalty, tokens = SparsityPenalty(model), torch.randint(3, VOCABULARY, (4, 128))

    def step() -> None:
        records: list[Any] = []
        with (
            without_prefix_graph(model) if cut else nullcontext(),
            SteeringMonitor(model, records.append),
        ):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        (loss + penalty(records[0])).backward()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = [float(p.grad.double().square().sum()) for p in trained if p.grad is not None]
    start = time.process_time()
    for _ in range(steps):
        step()
    seconds = (time.process_time() - start) / steps
    return {"seconds": seconds, "mebibytes": (peak - before) / 1024, "gradient": gradient}


def in_its_own_process(*arguments: Any) -> dict[str, Any]:
    """Peak memory is a process's: one for each measurement."""
    command = [sys.executable, __file__, "--one", json.dumps(arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    print("steered  checkpoints   CPU s/step           peak MiB             gradients differ by")
    print("layer                  plain    cut  ratio  plain    cut  ratio")
    for layer in options.layers:
        for checkpointing in (False, True):
            plain, cut = (
                in_its_own_process(layer, cut, checkpointing, options.steps)
                for cut in (False, True)
            )
            apart = max(
                abs(a - b) / b for a, b in zip(cut["gradient"], plain["gradient"], strict=True)
            )
            columns = [f"{layer:>5}  {'on' if checkpointing else 'off':>13}  "]
            for name, form in (("seconds", "6.2f"), ("mebibytes", "6.0f")):
                ratio = plain[name] / max(cut[name], 1e-9)
                columns.append(f"{plain[name]:{form}} {cut[name]:{form}} {ratio:6.2f}")
            print(" ".join(columns), f"{apart:18.1e}")


if __name__ == "__main__":
    main()
