"""What steering costs: the operation, a whole step, generation, compilations; one table.

    python benchmarks/speed.py [--device cuda] [--parts operation step generation compilations]

`operation`: a training step of the steering layer alone, compiled and eager, against its bare
matrix products: adapter, encoder and decoder forward, decoder transposed and weight gradient
backward. Its peak memory above what is held, against the products' own outputs.

`step`: forward and backward of a whole Gemma 2 (random weights; on a GPU the sizes of the 2B model,
on a CPU smaller ones) with FSRL on one layer, as a `with_fsrl` trainer does it, against LoRA of
rank 16 on all linear layers, without and with gradient checkpointing. Peak memory counts weights.

`generation`: tokens a second of the same models in 16 bits, against the base; with a dynamic cache,
and, on a GPU, with a static one, for which transformers compiles the decoding step.

`compilations`: how often the layer is compiled over 50 batches of random length.

Every ratio is of two things that ran in turn. On a GPU it takes less than five minutes: cases for
which these do not suffice are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from common import MIB, alternate, parser, peak_memory, ratio, report
from peft import LoraConfig, get_peft_model
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, Trainer, TrainingArguments

from peft_fsrl import FSRLConfig, FSRLLayer, with_fsrl

PARTS = ("operation", "step", "generation", "compilations")
SWITCH = "PEFT_FSRL_COMPILE"
# tokens, width, features
OPERATIONS = {
    "cuda": [(t, 2304, d_sae) for d_sae in (16384, 65536) for t in (2048, 8192)],
    "cpu": [(512, 96, 384), (64, 2304, 16384)],
    "quick": [(5, 16, 64)],
}
# Layers, the steered one, width of a head (of eight), features, words, sequences and their length.
MODELS = {
    "cuda": (26, 12, 288, 65536, 256000, (4, 512)),
    "cpu": (26, 12, 36, 8192, 32000, (2, 128)),
    "quick": (3, 1, 2, 64, 100, (1, 8)),
}


def row(
    part: str,
    case: str,
    what: str,
    figure: float | None,
    unit: str,
    against: str = "",
    share: list[float] | float | None = None,
    goal: str = "",
) -> dict[str, Any]:
    """A line of the table; `share` is the figure over that of `against`, `goal` as "<= 1.2"."""
    middle = share[1] if isinstance(share, list) else share
    met = None
    if goal and middle is not None:
        sign, bound = goal.split()
        met = (
            "yes" if (middle <= float(bound) if sign == "<=" else middle >= float(bound)) else "no"
        )
    found = {"part": part, "case": case, "what": what, "figure": figure, "unit": unit}
    return {**found, "against": against, "ratio": share, "goal": goal, "met": met}


def kept_going(part: str, case: str, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; where making them fails, a row that says so: nobody watches."""
    print(f"{part} {case} ...", file=sys.stderr, flush=True)
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        yield row(part, case, f"failed: {type(error).__name__}", None, "")


@contextmanager
def compiling(on: bool) -> Iterator[None]:
    """Steering layers that are made and called inside are compiled, or not."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = str(int(on))
    try:
        yield
    finally:
        del os.environ[SWITCH]
        if before is not None:
            os.environ[SWITCH] = before


@cache
def make_sae(d_in: int, d_sae: int, device: str) -> JumpReLUSAE:
    """A random one."""
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, device=device))
    sae.threshold.data.fill_(0.5)
    return sae.requires_grad_(False)


class Holder(nn.Module):
    """A model of nothing but the place that is steered."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """What comes in."""
        return self.place(x)


def make_layer(sae: JumpReLUSAE, sae_dtype: str | None, device: str) -> FSRLLayer:
    """A steering layer that trains, around the identity, and steers a feature in a hundred."""
    # Pre-activations of variance one.
    scale = (3 / sae.cfg.d_in) ** 0.5
    config = FSRLConfig(
        target_modules=["place"], sae=sae, sae_dtype=sae_dtype, init_scale=scale, init_threshold=2.6
    )
    model = get_peft_model(Holder(), config).to(device).train()
    return next(module for module in model.modules() if isinstance(module, FSRLLayer))


def layer_step(layer: FSRLLayer, x: Tensor, g: Tensor) -> None:
    """A training step: `g` is the gradient of the output; the L1 norm has one, too."""
    records: list[Any] = []
    layer.zero_grad(set_to_none=True)
    layer.statistics_observers.append(records.append)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        output = layer(x)
    layer.statistics_observers.clear()
    l1 = records[0].l1
    torch.autograd.backward([output, l1], [g, torch.full_like(l1, 0.1 / l1.numel())])


def matrix_products(x: Tensor, d_sae: int) -> Callable[[], list[Tensor]]:
    """The five products of a training step, in the dtype of `x`."""
    tokens, d_in = x.shape
    weight, W_dec, v, g = (
        torch.randn(shape, device=x.device, dtype=x.dtype)
        for shape in ((d_sae, d_in), (d_sae, d_in), (tokens, d_sae), (tokens, d_in))
    )
    W_enc = W_dec.T.contiguous()
    return lambda: [x @ weight.T, x @ W_enc, v @ W_dec, g @ W_dec.T, v.T @ x]


def measure_operation(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every size in every precision."""
    kinds = [("float32", torch.float32, None)]
    if options.on_gpu:
        torch.set_float32_matmul_precision("high")
        kinds = [("TF32", torch.float32, None)]
        kinds += [("bf16 autocast", torch.bfloat16, None)]
        kinds += [("bf16 autocast, SAE in bf16", torch.bfloat16, "bfloat16")]
    for tokens, d_in, d_sae in OPERATIONS[options.size]:
        for kind, dtype, sae_dtype in kinds:
            x, g = torch.randn(2, tokens, d_in, device=options.device, dtype=dtype)
            sae = make_sae(d_in, d_sae, options.device)
            case = f"{tokens} x {d_in} x {d_sae}, {kind}"
            compared = compare_operation(options, case, sae, sae_dtype, x, g)
            yield from kept_going("operation", case, compared)


def compare_operation(
    options: argparse.Namespace,
    case: str,
    sae: JumpReLUSAE,
    sae_dtype: str | None,
    x: Tensor,
    g: Tensor,
) -> Iterator[dict[str, Any]]:
    """Compiled and eager, over the products."""
    products = matrix_products(x, sae.cfg.d_sae)
    made = sum(each.nbytes for each in products()) / MIB

    def stepper(compiled: bool) -> Callable[[], None]:
        with compiling(compiled):
            layer = make_layer(sae, sae_dtype, options.device)

        def run() -> None:
            with compiling(compiled):
                layer_step(layer, x[None], g[None])

        return run

    steps = {"compiled": stepper(True), "eager": stepper(False)}
    cases: dict[str, Callable[[], object]] = {**steps, "products": lambda: len(products())}
    seconds = alternate(cases, options.repeats, options.device)
    time_ = {name: statistics.median(each) * 1e3 for name, each in seconds.items()}
    yield row("operation", case, "products", time_["products"], "ms")
    for name, step in steps.items():
        goals = ["<= 1.20", "<= 1.00"] if options.on_gpu and name == "compiled" else ["", ""]
        over = ratio(seconds[name], seconds["products"])
        yield row("operation", case, name, time_[name], "ms", "products", over, goals[0])
        peak = peak_memory(step, options.device)
        yield row("operation", case, name, peak, "MiB", "products' outputs", peak / made, goals[1])


def make_models(options: argparse.Namespace) -> dict[str, Any]:
    """The base, and adapters on twins that share its weights."""
    layers, layer, head, d_sae, words, _ = MODELS[options.size]
    width = 8 * head
    config = Gemma2Config(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=max(2, width // 9 // 2 * 2),
    )
    dtype = torch.bfloat16 if options.on_gpu else torch.float32
    with torch.device(options.device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    shared = {id(parameter): parameter for parameter in base.parameters()}
    sae = make_sae(width, d_sae, options.device)

    def attach(adapter: Any) -> Any:
        return get_peft_model(copy.deepcopy(base, dict(shared)), adapter)

    def steered(sae_dtype: str | None) -> Any:
        return attach(
            FSRLConfig(
                layer=layer, sae=sae, sae_dtype=sae_dtype, init_scale=1e-2, task_type="CAUSAL_LM"
            )
        )

    models = {
        "base": base,
        "LoRA": attach(LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")),
        "FSRL": steered(None),
    }
    if options.on_gpu:
        models["FSRL, SAE in bf16"] = steered("bfloat16")
    return models


def held(model: Any) -> float:
    """MiB of a model's weights and its SAEs'."""
    tensors = list(model.parameters())
    for module in model.modules():
        if isinstance(module, FSRLLayer):
            tensors += [p for sae in module.fsrl_sae.values() for p in sae.module.parameters()]
    return sum(each.nbytes for each in tensors) / MIB


def measure_step(options: argparse.Namespace, models: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """FSRL against LoRA, without and with gradient checkpointing."""
    adapted = {name: model for name, model in models.items() if name != "base"}
    cases = {name: step_of(options, name, model) for name, model in adapted.items()}
    sequences, length = MODELS[options.size][5]
    for checkpointing in (False, True):
        for model in adapted.values() if checkpointing else ():
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        case = f"{sequences} x {length} tokens" + ", checkpointing" * checkpointing
        seconds = alternate(cases, options.repeats, options.device)
        memory = {}
        for name, model in adapted.items():
            model.zero_grad(set_to_none=True)
            memory[name] = peak_memory(cases[name], options.device) + held(model)
            model.zero_grad(set_to_none=True)
        for name, times in seconds.items():
            time_ = statistics.median(times) * 1e3
            if name == "LoRA":
                yield row("step", case, name, time_, "ms")
                yield row("step", case, name, memory[name], "MiB")
                continue
            goals = ["<= 0.40", ""] if checkpointing else ["<= 0.52", "<= 0.65"]
            goals = goals if options.on_gpu else ["", ""]
            faster, smaller = ratio(times, seconds["LoRA"]), memory[name] / memory["LoRA"]
            yield row("step", case, name, time_, "ms", "LoRA", faster, goals[0])
            yield row("step", case, name, memory[name], "MiB", "LoRA", smaller, goals[1])
    for model in adapted.values():
        model.gradient_checkpointing_disable()


def step_of(options: argparse.Namespace, name: str, model: Any) -> Callable[[], object]:
    """Forward and backward as a trainer makes them."""
    words, shape = MODELS[options.size][4:]
    ids = torch.randint(3, words, shape, device=options.device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    arguments = TrainingArguments(
        str(options.out), use_cpu=not options.on_gpu, report_to="none", disable_tqdm=True
    )
    trainer = (Trainer if name == "LoRA" else with_fsrl(Trainer))(model, arguments)

    def run() -> None:
        model.train().zero_grad(set_to_none=True)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=options.on_gpu):
            loss = trainer.compute_loss(model, dict(batch))
        loss.backward()

    return run


def measure_generation(
    options: argparse.Namespace, models: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Every size of batch, with both caches; first what says most, for compiling takes long."""
    if options.on_gpu:
        models = {
            name: model.to(torch.bfloat16) for name, model in models.items() if name != "FSRL"
        }
    batches = [1] if options.quick else [1, 8, 64] if options.on_gpu else [1, 8]
    cases: list[tuple[int, str | None]] = [(batch, None) for batch in batches]
    cases += [(batch, "static") for batch in (1, 64, 8) if options.on_gpu]
    for batch, cache_kind in cases:
        case = f"batch {batch}, {'static cache, compiled' if cache_kind else 'dynamic cache'}"
        if cache_kind and time.monotonic() > options.deadline:
            yield row("generation", case, "no time left", None, "")
            continue
        compared = compare_generation(options, models, case, batch, cache_kind)
        yield from kept_going("generation", case, compared)


def compare_generation(
    options: argparse.Namespace,
    models: dict[str, Any],
    case: str,
    batch: int,
    cache_kind: str | None,
) -> Iterator[dict[str, Any]]:
    """Tokens a second against the base's."""
    new = 4 if options.quick else 32
    ids = torch.randint(3, MODELS[options.size][4], (batch, 16), device=options.device)

    def generate(model: Any) -> None:
        model.eval().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache_kind,
        )

    cases = {name: partial(generate, model) for name, model in models.items()}
    seconds = alternate(cases, min(3, options.repeats), options.device)
    for name, times in seconds.items():
        speed = batch * new / statistics.median(times)
        if name == "base":
            yield row("generation", case, name, speed, "tokens/s")
            continue
        goal = ">= 0.93" if options.on_gpu and name != "LoRA" else ""
        share = ratio(seconds["base"], times)
        yield row("generation", case, name, speed, "tokens/s", "base", share, goal)


def measure_compilations(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How many graphs 50 batches of random shape take."""
    from torch._dynamo.utils import counters

    d_in, d_sae = (16, 64) if options.quick else (128, 2048)
    torch._dynamo.reset()
    counters.clear()
    generator = random.Random(0)
    count = 3 if options.quick else 50
    with compiling(True):
        layer = make_layer(make_sae(d_in, d_sae, options.device), None, options.device)
        for _ in range(count):
            shape = (generator.randint(1, 8), generator.randint(2, 512), d_in)
            x = torch.randn(shape, device=options.device)
            layer_step(layer, x, torch.ones_like(x))
    found = float(counters["stats"]["unique_graphs"])
    # Without a compiler the layer runs as it is.
    name = "compiled" if found else "not compiled"
    share = found if found else None
    yield row("compilations", f"{count} random shapes", name, found, "graphs", "", share, "<= 4")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for and report it.

    Returns:
        1 if a case failed.
    """
    options_of = parser(__doc__)
    options_of.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options_of.add_argument("--minutes", type=float, default=3.5, help="starts nothing long after")
    options = options_of.parse_args(arguments)
    options.deadline = time.monotonic() + 60 * options.minutes
    options.on_gpu = options.device.startswith("cuda")
    options.size = "quick" if options.quick else options.device.partition(":")[0]
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    if "operation" in options.parts:
        rows += measure_operation(options)
    if "compilations" in options.parts:
        rows += kept_going("compilations", "", measure_compilations(options))
    if {"step", "generation"} & set(options.parts):
        models = make_models(options)
        if "step" in options.parts:
            rows += kept_going("step", "", measure_step(options, models))
        if "generation" in options.parts:
            rows += measure_generation(options, models)
    report("speed", options, rows)
    return int(any(each["what"].startswith("failed") for each in rows))


if __name__ == "__main__":
    sys.exit(main())
