"""Counters of what is steered, for Prometheus.

vLLM's engine runs in another process than the one that answers ``/metrics``. It writes totals into
a small file that both have mapped, and a collector reads them. The file is in memory and has no
name: it ends with the last of them, however that ends. Linux only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Path of the file, for the processes that the server starts.
VARIABLE = "PEFT_FSRL_COUNTERS"
_NAMES = {
    "steered_tokens": "Tokens that an FSRL adapter read",
    "steered_features": "Features that were steered, summed over tokens; over tokens it is l0",
    "nonfinite_tokens": "Tokens at which activations or steering were nan or inf",
}
# On a GPU, reading them makes the host wait.
_SECONDS = 1.0
_published: Collector | None = None


class Counters:
    """Totals by adapter, written to the file that the environment names, if it names one.

    Args:
        adapters: names, in the order of the file's rows.
    """

    def __init__(self, adapters: Sequence[str]) -> None:
        path = os.environ.get(VARIABLE)
        self._file = _map(path, len(adapters)) if path else None
        self._rows = {name: row for row, name in enumerate(adapters)}
        self._pending: dict[str, Tensor] = {}
        self._flushed = 0.0

    def add(self, adapter: str, l0: Tensor, nonfinite: Tensor) -> None:
        """Count the tokens of one application, given one number for each token."""
        found = torch.stack([torch.ones_like(l0).sum(), l0.sum(), nonfinite.sum()])
        pending = self._pending.get(adapter)
        self._pending[adapter] = found if pending is None else pending + found

    def flush(self) -> None:
        """Write what was counted, where that costs nothing, or not every time."""
        now = time.monotonic()
        on_cpu = all(found.device.type == "cpu" for found in self._pending.values())
        if self._file is None or not (on_cpu or now - self._flushed > _SECONDS):
            return
        self._flushed = now
        for adapter, found in self._pending.items():
            self._file[self._rows[adapter]] += found.double().cpu().numpy()
        self._pending.clear()


class Collector:
    """Makes the file and reads it; see ``prometheus_client.registry.Collector``."""

    def __init__(self, adapters: Sequence[str]) -> None:
        self._adapters = list(adapters)
        self._file = os.fdopen(os.memfd_create("peft_fsrl_counters"), "w+b")
        self._file.truncate(len(adapters) * len(_NAMES) * 8)
        self._totals = _map(self._file, len(adapters))

    @property
    def path(self) -> str:
        """Under which other processes find the file while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def close(self) -> None:
        """Let go of the file, which goes on where an engine has it."""
        self._file.close()

    def collect(self) -> Iterator[Any]:
        """The counters with their present values."""
        from prometheus_client.core import CounterMetricFamily

        for column, (name, text) in enumerate(_NAMES.items()):
            family = CounterMetricFamily(f"peft_fsrl_{name}", text, labels=["adapter"])
            for row, adapter in enumerate(self._adapters):
                family.add_metric([adapter], float(self._totals[row, column]))
            yield family


def publish(adapters: Sequence[str]) -> None:
    """Make the file, tell processes that are started from here, and register the collector.

    A second server in a process takes the place of the first one. Where several processes answer,
    they share vLLM's own counters only.
    """
    global _published
    if sys.platform != "linux" or "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return
    from prometheus_client import REGISTRY

    if _published is not None:
        REGISTRY.unregister(_published)
        _published.close()
    _published = Collector(adapters)
    os.environ[VARIABLE] = _published.path
    REGISTRY.register(_published)


def _map(file: Any, n_adapters: int) -> Any:
    return np.memmap(file, dtype=np.float64, mode="r+", shape=(n_adapters, len(_NAMES)))
