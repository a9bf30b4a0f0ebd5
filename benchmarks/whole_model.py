"""A training step of a whole model: FSRL against LoRA on all linear layers and the base itself.

    python benchmarks/whole_model.py [--quick] [--device cuda]

A Gemma 2 of random weights whose proportions are those of the 2B model (26 layers, MLP four times
the width, a vocabulary 111 times and an SAE 28 times as wide as the residual stream), scaled down.
`FSRL` trains an adapter on layer 12 as `with_fsrl` trainers do, without autograd below it; `LoRA`
has rank 16 on all linear layers; `base` trains every parameter; `forward` is the base model's
forward pass without a graph, for scale. Memory: what autograd keeps (MiB, parameters left out), and
how far a step raises the peak of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import (
    alternate,
    kept_for_backward,
    options,
    peak_memory,
    ratio,
    report,
    show_ms,
    show_ratio,
    table,
)
from peft import LoraConfig, get_peft_model
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from peft_fsrl import FSRLConfig, FSRLLayer
from peft_fsrl.steering import SteeringMonitor
from peft_fsrl.training.penalty import SparsityPenalty
from peft_fsrl.training.prefix import without_prefix_graph

LAYERS, LAYER, SAE_PER_WIDTH, VOCABULARY_PER_WIDTH = 26, 12, 65536 / 2304, 256000 / 2304
DENSITY = 0.01


def base_model(width: int, layers: int) -> Gemma2ForCausalLM:
    """A Gemma 2 in the proportions of the 2B model."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=int(VOCABULARY_PER_WIDTH * width),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=max(2, width // 9 // 2 * 2),
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).train()


def fsrl_model(model: nn.Module, layer: int, width: int, tokens: torch.Tensor) -> Any:
    """An adapter in the middle, at a density that training ends with."""
    d_sae = int(SAE_PER_WIDTH * width)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=width, d_sae=d_sae))
    sae.threshold.data.fill_(0.5)
    config = FSRLConfig(layer=layer, sae=sae, init_scale=1e-2, task_type="CAUSAL_LM")
    steered = get_peft_model(model, config).train()
    [place] = [each for each in steered.modules() if isinstance(each, FSRLLayer)]
    sizes: list[torch.Tensor] = []
    place.observers.append(lambda event: sizes.append(event.steering_vector.abs()))
    with torch.no_grad():
        steered(input_ids=tokens)
        place.fsrl_adapter["default"].threshold.fill_(sizes[0].flatten().quantile(1 - DENSITY))
    place.observers.clear()
    return steered


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and report."""
    found = options(__doc__, arguments)
    width, layers, layer = (16, 3, 1) if found.quick else (288, LAYERS, LAYER)
    batch, length = (1, 8) if found.quick else (2, 128)
    tokens = torch.randint(3, int(VOCABULARY_PER_WIDTH * width), (batch, length))
    tokens = tokens.to(found.device)
    plain = base_model(width, layers).to(found.device)
    fsrl = fsrl_model(base_model(width, layers).to(found.device), layer, width, tokens)
    lora = get_peft_model(
        base_model(width, layers).to(found.device),
        LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).train()
    penalty = SparsityPenalty(fsrl)

    def loss_of(model: Any) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    def fsrl_loss() -> torch.Tensor:
        records: list[Any] = []
        with without_prefix_graph(fsrl), SteeringMonitor(fsrl, records.append):
            loss = loss_of(fsrl)
        return loss + penalty(records[0])

    losses: dict[str, tuple[Any, Callable[[], torch.Tensor]]] = {
        "FSRL": (fsrl, fsrl_loss),
        "LoRA": (lora, lambda: loss_of(lora)),
        "base": (plain, lambda: loss_of(plain)),
    }

    def step(name: str) -> None:
        model, loss = losses[name]
        model.zero_grad(set_to_none=True)
        loss().backward()

    def forward() -> None:
        with torch.no_grad():
            loss_of(plain)

    cases: dict[str, Callable[[], object]] = {name: lambda name=name: step(name) for name in losses}
    seconds = alternate({**cases, "forward": forward}, found.repeats, found.device)
    rows, figures = [], []
    memory: dict[str, dict[str, float]] = {}
    [place] = [each for each in fsrl.modules() if isinstance(each, FSRLLayer)]
    frozen = list(place.fsrl_sae["default"].module.parameters())
    for name, (model, loss) in losses.items():
        with kept_for_backward(model, *frozen) as kept:
            _ = loss()
        del _
        model.zero_grad(set_to_none=True)
        memory[name] = {"kept": kept[0], "peak": peak_memory(cases[name], found.device)}
    for name in losses:
        trained = sum(p.numel() for p in losses[name][0].parameters() if p.requires_grad)
        against = {other: ratio(seconds[name], seconds[other]) for other in ("LoRA", "base")}
        rows.append(
            [
                name,
                f"{trained / 1e6:.2f} M",
                show_ms(seconds[name]),
                *(show_ratio(value) for value in against.values()),
                f"{memory[name]['kept']:.0f}",
                f"{memory[name]['kept'] / memory['LoRA']['kept']:.2f}",
                f"{memory[name]['peak']:.0f}",
            ]
        )
        figures.append({"name": name, "seconds": seconds[name], "ratios": against, **memory[name]})
    rows.append(["forward", "", show_ms(seconds["forward"]), *[""] * 5])
    header = ["", "trains", "step, ms", "time / LoRA", "time / base", "kept MiB", "kept / LoRA"]
    title = (
        f"Training step, {layers} layers of width {width}, SAE of {int(SAE_PER_WIDTH * width)} "
        f"on layer {layer}, {batch} x {length} tokens"
    )
    return report("whole_model", found, [table(title, [*header, "peak MiB"], rows)], figures)


if __name__ == "__main__":
    main()
