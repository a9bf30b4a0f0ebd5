"""Report nan and inf where an adapter steers, without stopping the run or waiting for the GPU."""

from __future__ import annotations

import warnings
from collections import defaultdict

from torch import Tensor

from ..steering import ForwardRecord

__all__ = ["NonfiniteReport"]


class NonfiniteReport:
    """Counts tokens with nan or inf, and warns once for each adapter and layer that had any.

    Give ``add`` to a ``SteeringMonitor``. Counts stay on the device of their layer; ``warn`` reads
    them, so call it where values are read anyway, as when metrics are logged.

    Example:
        >>> from peft_fsrl.training.nonfinite import NonfiniteReport
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

    def warn(self) -> None:
        """Warn of each adapter and layer that has had such tokens and was not warned of before."""
        for (adapter_name, layer_name), count in self.counts().items():
            if (adapter_name, layer_name) in self._warned:
                continue
            self._warned.add((adapter_name, layer_name))
            warnings.warn(
                f"nan or inf in {count} tokens where adapter '{adapter_name}' steers "
                f"'{layer_name}': in that module's own output, or in the steering vector. With "
                "`model.disable_adapter()` you see whether the base model gives them by itself "
                "(float16 overflows; try bfloat16). If not, the adapter has diverged: lower the "
                "learning rate, and look for prompts that leave no completion.",
                stacklevel=2,
            )
