"""Attaching, saving and loading an adapter, and generating with it.

    python benchmarks/startup.py [--quick] [--device cuda]

Time and peak memory of `load_sae`, `get_peft_model`, `save_pretrained` and
`PeftModel.from_pretrained` with an SAE in a local folder, memory also as a ratio of the sizes that
have to be in memory; the copying of the SAE's file, for scale. Then tokens per second of `generate`
with the adapter, with the adapter disabled, and without one, on the model of `whole_model.py`.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    alternate,
    fits,
    options,
    peak_memory,
    ratio,
    report,
    show_ms,
    show_ratio,
    table,
)
from peft import PeftModel, get_peft_model
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from transformers import LlamaConfig, LlamaForCausalLM
from whole_model import LAYER, LAYERS, base_model, fsrl_model

from peft_fsrl import FSRLConfig, load_sae


def small_model(width: int) -> LlamaForCausalLM:
    """A model that weighs nothing beside its SAE."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return LlamaForCausalLM(config)


def steps_of(
    folder: Path, d_in: int, d_sae: int, kept: list[Any]
) -> dict[str, tuple[Callable[[], Any], int]]:
    """The steps of an adapter's life, with the number of matrices that each must hold.

    Writes the SAE, and an adapter to be loaded; ``kept`` has the model to be saved.
    """
    sae, adapter = folder / "sae", folder / "adapter"
    JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae)).save_model(sae)
    gc.collect()
    # Each is used up: an adapter stays in the model that it is put into, and its SAE with it.
    bases = [small_model(d_in) for _ in range(4)]

    def attach() -> Any:
        config = FSRLConfig(layer=0, sae=str(sae), task_type="CAUSAL_LM")
        return get_peft_model(bases.pop(), config)

    def save() -> None:
        kept[0].save_pretrained(adapter)

    kept.append(attach())
    save()
    weights = sae / "sae_weights.safetensors"
    return {
        "save_pretrained": (save, 0),
        "copy the SAE's file": (lambda: shutil.copy(weights, folder / "copy"), 0),
        "load_sae": (lambda: load_sae(str(sae)), 2),
        "get_peft_model": (attach, 3),
        "from_pretrained": (lambda: PeftModel.from_pretrained(bases.pop(), adapter), 3),
        "from_pretrained, low_cpu_mem_usage": (
            lambda: PeftModel.from_pretrained(bases.pop(), adapter, low_cpu_mem_usage=True),
            3,
        ),
    }


def measure_start(found: Any) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Time and memory of each step, in MiB and against the matrices that have to be held."""
    rows, figures = [], []
    for d_in, d_sae in ((16, 64),) if found.quick else ((2304, 16384), (2304, 65536)):
        matrix = d_in * d_sae * 4 / MIB
        if not fits(f"{d_in} x {d_sae}", 6 * matrix):
            continue
        with tempfile.TemporaryDirectory() as folder:
            kept: list[Any] = []
            for name, (run, matrices) in steps_of(Path(folder), d_in, d_sae, kept).items():
                took, peak = measure(run, found.device)
                # Saved first: from then on nobody holds the SAE that the next steps load.
                kept.clear()
                share = f"{peak / (matrices * matrix):.2f}" if matrices else ""
                rows.append([f"{d_in} x {d_sae}", name, f"{took:.2f}", f"{peak:.0f}", share])
                figures.append({"d_in": d_in, "d_sae": d_sae, "what": name, "seconds": took})
                figures[-1]["peak_mib"] = peak
    return rows, figures


def measure(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds and peak MiB of one call."""
    took: list[float] = []

    def timed() -> Any:
        start = time.perf_counter()
        result = run()
        took.append(time.perf_counter() - start)
        return result

    peak = peak_memory(timed, device)
    return took[0], peak


def measure_generate(found: Any) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Tokens per second with and without an adapter."""
    width, layers, layer = (16, 3, 1) if found.quick else (288, LAYERS, LAYER)
    new = 4 if found.quick else 32
    tokens = torch.randint(3, 100, (1, 16), device=found.device)
    plain = base_model(width, layers).to(found.device).eval()
    steered = base_model(width, layers).to(found.device)
    steered = fsrl_model(steered, layer, width, tokens).eval()

    def generate(model: Any) -> None:
        model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    def disabled() -> None:
        with steered.disable_adapter():
            generate(steered)

    seconds = alternate(
        {
            "without an adapter": lambda: generate(plain),
            "adapter disabled": disabled,
            "with the adapter": lambda: generate(steered),
        },
        found.repeats,
        found.device,
    )
    rows, figures = [], []
    for name, times in seconds.items():
        speed = new / statistics.median(times)
        against = ratio(times, seconds["without an adapter"])
        rows.append([name, f"{speed:.1f}", show_ms(times), show_ratio(against)])
        figures.append({"what": name, "tokens_per_second": speed, "ratio": against})
    return rows, figures


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and report."""
    found = options(__doc__, arguments)
    generated, speeds = measure_generate(found)
    started, figures = measure_start(found)
    header = ["SAE", "step", "s", "peak MiB", "of SAE and adapter"]
    tables = [
        table("Attaching, saving, loading", header, started),
        table("generate", ["", "tokens/s", "ms", "time / without"], generated),
    ]
    return report("startup", found, tables, [*figures, *speeds])


if __name__ == "__main__":
    main()
