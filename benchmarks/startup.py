"""Attaching, saving and loading an adapter: time and memory.

    python benchmarks/startup.py [--quick]

Time and peak memory of `load_sae`, `get_peft_model`, `save_pretrained` and
`PeftModel.from_pretrained` with an SAE in a local folder, memory also as a ratio of the sizes that
have to be in memory; the copying of the SAE's file, for scale.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import MIB, parser, peak_memory, report
from peft import PeftModel, get_peft_model
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from transformers import LlamaConfig, LlamaForCausalLM

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


def measure_start(d_in: int, d_sae: int, device: str) -> list[dict[str, Any]]:
    """Time and memory of each step, in MiB and against the matrices that have to be held."""
    matrix = d_in * d_sae * 4 / MIB
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kept: list[Any] = []
        for name, (run, matrices) in steps_of(Path(folder), d_in, d_sae, kept).items():
            took, peak = measure(run, device)
            # Saved first: from then on nobody holds the SAE that the next steps load.
            kept.clear()
            share = peak / (matrices * matrix) if matrices else None
            found = {"SAE": f"{d_in} x {d_sae}", "step": name, "s": took, "peak MiB": peak}
            rows.append({**found, "of SAE and adapter": share})
    return rows


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options = parser(__doc__).parse_args(arguments)
    sizes = [(16, 64)] if options.quick else [(2304, 16384), (2304, 65536)]
    rows = [row for size in sizes for row in measure_start(*size, options.device)]
    report("startup", options, rows)


if __name__ == "__main__":
    main()
