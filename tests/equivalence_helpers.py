"""Batches of random tokens for the tests of `peft_fsrl.equivalence`."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers import token_ids


def batches(n: int = 6, seed: int = 0) -> list[dict[str, Tensor]]:
    """Padded on both sides, with labels on the later tokens of each sequence."""
    found = []
    for index in range(n):
        ids = token_ids(8, 9, seed=seed + index)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        mask[1, :2] = 0
        labels = ids.masked_fill((mask == 0) | (torch.arange(9) < 4), -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model's forward takes of a batch without computing a loss."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
