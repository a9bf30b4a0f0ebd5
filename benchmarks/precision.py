"""What 16 bits cost: memory of SAE and adapter, accuracy of what they add and of the loss.

    python benchmarks/precision.py --adapter runs/organism           # what `make demo` trained
    python benchmarks/precision.py --model FOLDER --sae FOLDER FOLDER --texts README.md

Without `--model`, the model organism. Every combination of float32 and bfloat16 for the SAE
(`sae_dtype`) and the adapter steers the same model in float32, and the last row is that model in
bfloat16 with both; each is compared with the same in float64. Without `--adapter`, an adapter is
made from the SAE's own encoder: its rows halved, every other one negated, under thresholds that
each let through one token in a hundred.

`error of the change`: the norm of the difference of `x' - x` over the norm of `x' - x`, over all
tokens. `loss`: mean negative log likelihood of the texts under the steered model, in nats.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import MIB, parser, report
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_fsrl import FSRLConfig, FSRLLayer, SteeringEvent, observe, organism

# SAE, adapter, base.
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
]


class Passed(NamedTuple):
    """What one pass gave: the change of each token, its steered features, the loss."""

    change: Tensor
    l0: float
    loss: float


def layer_of(model: Any) -> FSRLLayer:
    """The only steered layer."""
    [layer] = [module for module in model.modules() if isinstance(module, FSRLLayer)]
    return layer


def run(model: Any, batch: dict[str, Tensor]) -> Passed:
    """One pass over the texts, of which padding does not count."""
    layer, real = layer_of(model), batch["attention_mask"].bool()
    events: list[SteeringEvent] = []
    outputs: list[Tensor] = []

    def look(module: Any, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.base_layer.register_forward_hook(look)
    labels = batch["input_ids"].masked_fill(~real, -100)
    with torch.no_grad(), observe(model, events.append):
        loss = model(**batch, labels=labels).loss
    handle.remove()
    change = (outputs[0].double() - events[0].hidden_states.double())[real]
    l0 = (events[0].steering_vector != 0)[real].sum(-1).double().mean()
    return Passed(change, float(l0), float(loss))


def follow_the_encoder(model: Any, batch: dict[str, Tensor]) -> None:
    """Make the adapter from the SAE's encoder; see above."""
    layer = layer_of(model)
    [adapter], [sae] = layer.fsrl_adapter.values(), layer.fsrl_sae.values()
    half = torch.full_like(adapter.bias, 0.5)
    half[1::2] *= -1
    events: list[SteeringEvent] = []
    with torch.no_grad():
        adapter.weight.copy_(half[:, None] * sae.module.W_enc.T)
        adapter.bias.copy_(half * sae.module.b_enc)
        adapter.threshold.zero_()
        with observe(model, events.append):
            model(**batch)
        sizes = events[0].steering_vector[batch["attention_mask"].bool()].abs()
        # Between two tokens' values: on one of them, rounding would decide about it.
        ordered = sizes.sort(dim=0).values
        last = int(0.99 * len(sizes))
        adapter.threshold.copy_(ordered[last - 1 : last + 1].mean(dim=0))


def measure(name: str, model: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Every combination against float64."""
    layer = layer_of(model)
    [adapter], [(key, sae)] = layer.fsrl_adapter.values(), layer.fsrl_sae.items()
    stored = {k: v.clone() for k, v in model.state_dict().items()}
    model.to(torch.float64)
    exact = run(model, batch)
    rows = []
    for sae_dtype, adapter_dtype, base_dtype in DTYPES:
        # Each from what is stored: what was rounded does not come back.
        model.to(torch.float64).load_state_dict(stored)
        model.to(base_dtype)
        adapter.to(adapter_dtype)
        layer.fsrl_sae[key] = sae.to(sae.device, sae_dtype)
        found = run(model, batch)
        error = (found.change - exact.change).norm() / exact.change.norm()
        figures = {
            "on": name,
            "SAE": str(sae_dtype).removeprefix("torch."),
            "adapter": str(adapter_dtype).removeprefix("torch."),
            "base": str(base_dtype).removeprefix("torch."),
            "MiB, SAE": sum(p.nbytes for p in layer.fsrl_sae[key].module.parameters()) / MIB,
            "MiB, adapter": sum(p.nbytes for p in adapter.parameters()) / MIB,
            "error of the change": float(error),
            "features steered": found.l0,
            "loss": f"{found.loss:.4f}",
            "error of the loss": abs(found.loss - exact.loss) / exact.loss,
        }
        rows.append(figures)
    return rows


def texts_of(options: argparse.Namespace) -> list[str]:
    """Pairs' chosen answers, or a file in paragraphs."""
    if options.texts:
        return [text for text in options.texts.read_text("utf-8").split("\n\n") if len(text) > 200]
    rows = organism.preferences(4 if options.quick else 64, seed="test-0")
    return [row["prompt"] + row["chosen"] for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options_of = parser(__doc__)
    options_of.add_argument("--model", type=Path, help="folder of a language model")
    options_of.add_argument("--sae", nargs="+", help="folders or references of SAEs")
    options_of.add_argument("--adapter", type=Path, help="folder of an adapter on the model")
    options_of.add_argument("--texts", type=Path, help="a text file, in paragraphs")
    options_of.add_argument("--sequences", type=int, default=64, help="how many texts at most")
    options = options_of.parse_args(arguments)
    creature = organism.load()
    folder = options.model or creature.path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = texts_of(options)[: options.sequences]
    batch = dict(
        tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
    )
    batch = {key: batch[key].to(options.device) for key in ("input_ids", "attention_mask")}
    rows = []
    for sae in [options.adapter] if options.adapter else options.sae or [str(creature.sae_path)]:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if options.adapter:
            model = PeftModel.from_pretrained(base, options.adapter)
        else:
            model = get_peft_model(base, FSRLConfig(sae=sae, task_type="CAUSAL_LM"))
            follow_the_encoder(model.to(options.device), batch)
        rows += measure(Path(str(sae)).name, model.eval().to(options.device), batch)
    report("precision", options, rows)


if __name__ == "__main__":
    main()
