"""What a trainer logs about steering: sums over real tokens, and their running means."""

from __future__ import annotations

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
        self._totals.clear()
        self._weights.clear()
        return means
