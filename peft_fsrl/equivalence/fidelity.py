"""What replacing an adapter by something else costs: next-token loss, and divergence from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ..steering import base_model
from ..training.likelihood import compute_kl, next_log_probabilities
from ..training.running import as_base, evaluating
from .batches import Batches, check_batches, model_inputs, scored_tokens

BASE, FSRL = "base", "FSRL"


@dataclass(frozen=True)
class Fidelity:
    """How a model predicts, and how far that is from the steered model; means over tokens.

    Attributes:
        loss: mean negative log likelihood of the data's tokens, in nats.
        kl: mean ``KL(FSRL || this)`` of the next-token distributions, in nats.
    """

    loss: float
    kl: float


@dataclass(frozen=True)
class Comparison:
    """A steered model, its base, and what is to stand for the adapter, on the same tokens.

    Attributes:
        n_tokens: how many tokens were predicted.
        models: by name; ``"base"`` and ``"FSRL"`` are always there.
    """

    n_tokens: int
    models: Mapping[str, Fidelity]

    def kept_kl(self, name: str) -> float:
        """``1 - KL(FSRL || name) / KL(FSRL || base)``; nan where the adapter has no effect.

        Below 0 where the base model is nearer to the steered one than the stand-in is.
        """
        base = self.models[BASE].kl
        return 1 - self.models[name].kl / base if base else float("nan")

    def __str__(self) -> str:
        rows = [f"{'':24}{'loss':>9}{'KL to FSRL':>12}{'of the KL':>11}   ({self.n_tokens} tokens)"]
        for name, found in self.models.items():
            kept = "" if name in (BASE, FSRL) else f"{self.kept_kl(name):11.1%}"
            rows.append(f"{name:24}{found.loss:9.4f}{found.kl:12.5f}{kept}")
        return "\n".join(rows)


def measure_fidelity(
    model: nn.Module,
    data: Batches,
    stand_ins: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
) -> Comparison:
    """Compare a steered model with its base and with stand-ins for its adapter.

    Args:
        model: a causal language model with FSRL adapters.
        data: batches of ``input_ids``, ``attention_mask`` and, to score some tokens only,
            ``labels`` with -100 elsewhere.
        stand_ins: by name, a function that returns a context in which the base model acts as the
            stand-in; see ``SingleLoRA.stand_ins``.

    Raises:
        TypeError: see ``batches.check_batches``.
        ValueError: if no token is scored.
    """
    entered = {BASE: nullcontext, **(stand_ins or {})}
    totals = {name: torch.zeros(2, dtype=torch.float64) for name in (*entered, FSRL)}
    n_tokens = 0
    inner = base_model(model)
    with evaluating(model):
        for batch in check_batches(data):
            inputs, scored = model_inputs(batch, inner), scored_tokens(batch)
            targets = batch["input_ids"].cpu()[scored][:, None]
            n_tokens += len(targets)
            steered = next_log_probabilities(inner, inputs, scored, torch.float64).cpu()
            totals[FSRL][0] -= steered.gather(1, targets).sum()
            for name, enter in entered.items():
                with as_base(model), enter():
                    found = next_log_probabilities(inner, inputs, scored, torch.float64).cpu()
                totals[name][0] -= found.gather(1, targets).sum()
                totals[name][1] += compute_kl(steered, found).sum()
    if not n_tokens:
        raise ValueError("Expected at least one token to predict, found none.")
    figures = {name: Fidelity(*(total / n_tokens).tolist()) for name, total in totals.items()}
    return Comparison(n_tokens, {BASE: figures.pop(BASE), FSRL: figures.pop(FSRL), **figures})
