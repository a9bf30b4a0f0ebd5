"""What a trainer logs about steering: sums over real tokens, and nan and inf among them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from ..steering import ForwardRecord

NAMES = ("l0", "l1", "l2", "nonfinite")


def token_totals(records: Iterable[ForwardRecord], adapters: Iterable[str]) -> dict[str, Tensor]:
    """Sums over real tokens by adapter: what ``NAMES`` lists, and the number of tokens.

    Args:
        records: of some forward passes.
        adapters: which adapters count. The frozen copy that serves as a reference does not.

    Returns:
        By adapter, a tensor of shape ``(5,)``.
    """
    chosen = set(adapters)
    totals: dict[str, Tensor] = {}
    for record in records:
        for tokens in record.tokens:
            if tokens.adapter_name not in chosen:
                continue
            real = torch.ones_like(tokens.l1) if record.mask is None else record.mask > 0
            real = real.to(tokens.l1.device, torch.bool)
            sums = [getattr(tokens, name).detach()[real].sum() for name in NAMES]
            row = torch.stack([*sums, real.sum().to(sums[0])])
            previous = totals.get(tokens.adapter_name)
            totals[tokens.adapter_name] = row if previous is None else previous + row.to(previous)
    return totals


class Means:
    """Running weighted means by name."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor | float] = defaultdict(float)
        self._weights: dict[str, Tensor | float] = defaultdict(float)

    def add(self, name: str, total: Tensor, weight: Tensor | float) -> None:
        """Add ``weight`` values whose sum is ``total``."""
        self._totals[name] = self._totals[name] + total
        self._weights[name] = self._weights[name] + weight

    def add_tokens(self, totals: dict[str, Tensor]) -> None:
        """Add what ``token_totals`` returned, all adapters together."""
        for row in totals.values():
            for name, total in zip(NAMES, row, strict=False):
                self.add(name, total, row[-1])

    def pop(self, prefix: str) -> dict[str, float]:
        """The means since the last call, under prefixed names."""
        means = {
            prefix + name: float(total) / float(self._weights[name])
            for name, total in self._totals.items()
            if float(self._weights[name])
        }
        self.clear()
        return means

    def clear(self) -> None:
        """Forget what was added."""
        self._totals.clear()
        self._weights.clear()


class NonfiniteReport:
    """Counts tokens with nan or inf, and warns once for each adapter and layer that had any.

    Give ``add`` to a ``SteeringMonitor``. Counts stay on the device of their layer; ``counts`` and
    ``warn`` read them, so call those where values are read anyway, as when metrics are logged.

    Example:
        >>> from peft_fsrl.training import NonfiniteReport
        >>> report = NonfiniteReport()
        >>> report.warn()
        >>> report.counts()
        {}
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], Tensor | float] = defaultdict(float)
        self._warned: set[tuple[str, str]] = set()

    def add(self, record: ForwardRecord) -> None:
        """Count the real tokens of a forward pass; padding may hold anything."""
        for tokens in record.tokens:
            bad = tokens.nonfinite
            if record.mask is not None:
                bad = bad * (record.mask > 0).to(bad)
            place = (tokens.adapter_name, tokens.layer_name)
            self._counts[place] = self._counts[place] + bad.sum()

    def counts(self) -> dict[tuple[str, str], int]:
        """How many tokens with nan or inf there were so far, by adapter and layer; none are 0."""
        counted = {place: int(total) for place, total in self._counts.items()}
        return {place: count for place, count in counted.items() if count}

    def describe(self) -> list[str]:
        """A sentence and the likely cause for each adapter and layer that has had such tokens."""
        return [_describe(*place, count) for place, count in self.counts().items()]

    def warn(self) -> None:
        """Warn of each adapter and layer that has had such tokens and was not warned of before."""
        for place, count in self.counts().items():
            if place not in self._warned:
                self._warned.add(place)
                warnings.warn(_describe(*place, count), stacklevel=2)


def _describe(adapter_name: str, layer_name: str, count: int) -> str:
    return (
        f"nan or inf in {count} tokens where adapter '{adapter_name}' steers '{layer_name}': in "
        "that module's own output, or in the steering vector. With `model.disable_adapter()` you "
        "see whether the base model gives them by itself (float16 overflows; try bfloat16). If "
        "not, the adapter has diverged: lower the learning rate, and look for prompts that leave "
        "no completion."
    )
