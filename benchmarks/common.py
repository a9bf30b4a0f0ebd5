"""What the benchmarks share: the plain implementation, alternating timing, memory, tables."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fsrl import FSRLConfig, FSRLLayer, freeze_sae

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def options(doc: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line that every benchmark has; sets threads and seed."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", default="cpu", help="'cuda' is supported and was not measured")
    parser.add_argument("--repeats", type=int, default=None, help="times that each case is run")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON record")
    found = parser.parse_args(arguments)
    found.repeats = found.repeats or (2 if found.quick else 7)
    if found.threads:
        torch.set_num_threads(found.threads)
    torch.manual_seed(0)
    return found


def synchronize(device: str) -> None:
    """Wait for a GPU; a CPU has nothing to wait for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def alternate(
    cases: dict[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every case, each run in turn, so that a busy spell of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, run in cases.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of two series that were measured in turn."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def show_ratio(value: dict[str, float]) -> str:
    """As ``1.52 (1.50-1.55)``: the median and the quartiles."""
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"


def show_ms(seconds: Sequence[float]) -> str:
    """The median in milliseconds, to three digits."""
    milliseconds = statistics.median(seconds) * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))


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


@contextmanager
def kept_for_backward(model: nn.Module, *others: Tensor) -> Iterator[list[float]]:
    """Collects the MiB of tensors that autograd keeps, parameters and ``others`` left out."""
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *others)}
    storages: dict[int, int] = {}
    # Held, or a freed tensor's address would be another's and that one would not count.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    result: list[float] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result
    result.append(sum(storages.values()) / MIB)


def available_memory() -> float:
    """MiB that a process may still take; infinity where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable"))


def fits(what: str, mebibytes: float) -> bool:
    """Whether there is room for a case; says so where there is not."""
    free = available_memory()
    if mebibytes > 0.9 * free:
        print(f"skipped: {what} needs {mebibytes:.0f} MiB, {free:.0f} MiB are free")
        return False
    return True


class Case(NamedTuple):
    """A steering layer around the identity, and all that the plain implementation needs."""

    layer: FSRLLayer
    sae: Any
    x: Tensor
    weight: nn.Parameter
    bias: nn.Parameter
    threshold: nn.Parameter

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """What trains."""
        return self.weight, self.bias, self.threshold

    def set_density(self, density: float) -> None:
        """Let a share of the features through, over all tokens."""
        with torch.no_grad():
            u = F.linear(self.sae.process_sae_in(self.x), self.weight, self.bias).abs().flatten()
            if len(u) > 2**24:
                u = u[:: len(u) // 2**24 + 1]
            level = u.kthvalue(max(1, int((1 - density) * len(u)))).values
            self.threshold.fill_(level)


def make_case(d_in: int, d_sae: int, tokens: int, device: str = "cpu") -> Case:
    """A random JumpReLU SAE, an adapter on it, and activations."""
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, device=device))
    sae.threshold.data.fill_(0.5)
    sae.requires_grad_(False)
    layer = FSRLLayer(nn.Identity(), "identity")
    frozen = freeze_sae(sae)
    layer.update_layer("default", FSRLConfig(layer=0, sae=sae, init_scale=1.0), frozen)
    layer.to(device).train()
    adapter = layer.fsrl_adapter["default"]
    x = torch.randn(1, tokens, d_in, device=device)
    return Case(layer, sae, x, adapter.weight, adapter.bias, adapter.threshold)


def plain_steer(case: Case, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formula in the obvious way: ``x'``, and the three norms of ``v`` of each token."""
    sae = case.sae
    f = sae.encode(x)
    u = F.linear(sae.process_sae_in(x), case.weight, case.bias)
    v = torch.sign(u) * torch.relu(u.abs() - case.threshold)
    steered = torch.relu(f + v)
    output = x + sae.decode(steered) - sae.decode(f)
    return output, (v != 0).sum(dim=-1), v.norm(p=1, dim=-1), v.norm(p=2, dim=-1)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(available_memory() / 1024, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def render_table(table: dict[str, Any]) -> str:
    """A table of a record, in Markdown."""
    rows = [table["header"], ["---"] * len(table["header"]), *table["rows"]]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([f"**{table['title']}**", "", *lines, ""])


def render_record(record: dict[str, Any]) -> str:
    """The tables of a benchmark, and on what they were made, in Markdown."""
    on = record["machine"]
    where = (
        f"`{record['command']}`, {on['date']}: {on['cpu']}, {on['cores']} cores, "
        f"{on['threads']} threads of torch {on['torch']}, Python {on['python']}, "
        f"device {record['device']}, {record['repeats']} repeats."
    )
    return "\n".join([where, "", *(render_table(table) for table in record["tables"])])


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table of a record."""
    return {"title": title, "header": list(header), "rows": [list(map(str, row)) for row in rows]}


def report(
    name: str, found: argparse.Namespace, tables: list[dict[str, Any]], figures: list[Any]
) -> dict[str, Any]:
    """Print the tables and write the record.

    Args:
        name: of the benchmark.
        found: its options.
        tables: what people read, from ``table``.
        figures: what programs read: any JSON.
    """
    record = {
        "name": name,
        "command": f"python benchmarks/{name}.py" + (" --quick" if found.quick else ""),
        "device": found.device,
        "repeats": found.repeats,
        "machine": machine(),
        "tables": tables,
        "figures": figures,
    }
    found.out.mkdir(parents=True, exist_ok=True)
    (found.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(render_record(record))
    return record
