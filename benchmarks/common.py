"""What the benchmarks share: timing in turn, peak memory, the table and the record."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
LIBRARIES = ("torch", "transformers", "peft", "sae-lens")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    made.add_argument("--device", default="cpu")
    made.add_argument("--repeats", type=int, default=7, help="times that each case is timed")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON record")
    return made


def alternate(
    cases: dict[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every case, each run in turn, so that a busy spell of the machine hits all.

    The first round, in which compilers and allocators warm up, does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, run in cases.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios of what was measured in turn."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    if len(ratios) == 1:
        return ratios * 3
    return statistics.quantiles(ratios, n=4, method="inclusive")


def peak_memory(run: Callable[[], object], device: str = "cpu") -> float:
    """MiB that a call took at most above what was held before it; nan where nobody counts."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / MIB
    try:
        # What was freed and not given back would hide what is taken next.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held = _status("VmRSS")
    except (AttributeError, OSError, StopIteration):
        run()
        return float("nan")
    kept = run()
    peak = _status("VmHWM") - held
    del kept
    return peak


def report(name: str, options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of the same keys as one table in Markdown, and write them with the machine."""
    where = _machine(options.device)
    print(f"`{' '.join([f'python benchmarks/{name}.py', *sys.argv[1:]])}`: {where}.\n")
    for cells in (list(rows[0]), ["---"] * len(rows[0]), *(map(_show, r.values()) for r in rows)):
        print("| " + " | ".join(cells) + " |")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": where, "device": options.device, "rows": list(rows)}
    path = options.out / f"{name}-{options.device.partition(':')[0]}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _show(value: Any) -> str:
    """A cell: three digits of a number, the median of quartiles with the others in brackets."""
    if isinstance(value, list):
        return f"{value[1]:.2f} ({value[0]:.2f}-{value[2]:.2f})"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def _machine(device: str) -> str:
    """What the figures depend on."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    place = f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    if device.startswith("cuda"):
        place = torch.cuda.get_device_name(device)
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"{place}; {libraries}, Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}"


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))
