"""Which features an adapter steers, how often and how strongly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._running import evaluating
from ..steering import SteeringEvent, fsrl_layers, observe
from ..tokens import tokenize
from .preferences import batched, pad
from .records import FeatureUse, Usage


def compute_usage(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    answer: str = "chosen",
    labels: Mapping[int, str] | None = None,
    batch_size: int = 16,
    description: str | None = None,
) -> Usage:
    """Use of each feature over the tokens of the answers; prompts and padding never count.

    Only sums per feature are kept: memory does not grow with the data set.

    Args:
        model: a model with one FSRL layer.
        dataset: rows with the texts ``prompt`` and ``answer``.
        tokenizer: the model's tokenizer.
        answer: the column whose tokens are counted.
        labels: what features detect, where known.
        batch_size: texts per forward pass.
        description: shown beside the progress bar; None shows no bar.

    Raises:
        ValueError: for more than one FSRL layer, or an empty data set.
    """
    layers = fsrl_layers(model)
    if len(layers) != 1:
        raise ValueError(f"Expected one FSRL layer, found {sorted(layers)}.")
    totals = _Totals()
    device = next(model.parameters()).device
    progress = tqdm(desc=description, unit="text", disable=description is None, leave=False)
    with evaluating(model), observe(model, totals.add), progress:
        for rows in batched(dataset, batch_size):
            batch = pad([tokenize(row["prompt"], row[answer], tokenizer) for row in rows], device)
            totals.mask = batch.answer_mask
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            progress.update(len(rows))
    return totals.to_usage(labels or {})


class _Totals:
    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._n_tokens = 0
        self._sums: Tensor | None = None
        self._feature_index = torch.arange(0)

    def add(self, event: SteeringEvent) -> None:
        assert self.mask is not None
        v = event.steering_vector[self.mask.bool()].double()
        self._feature_index = event.sae.feature_index
        self._n_tokens += v.shape[0]
        sums = torch.stack([(v != 0).double().sum(0), v.sum(0), v.abs().sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums

    def to_usage(self, labels: Mapping[int, str]) -> Usage:
        if self._sums is None:
            raise ValueError("Expected at least one text on which an adapter acts, found none.")
        count, signed, absolute = (self._sums / self._n_tokens).cpu()
        order = [int(i) for i in absolute.argsort(descending=True) if count[i] > 0]
        index = self._feature_index.tolist()
        features = tuple(
            FeatureUse(
                index[i],
                float(count[i]),
                float(signed[i]),
                float(absolute[i]),
                labels.get(index[i]),
            )
            for i in order
        )
        return Usage(self._n_tokens, float(count.sum()), float(absolute.sum()), features)
