"""What a fine-tune does to the residual stream, said in the features of an SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .capture import Batches
from .converse import LinearAdapter, from_factors
from .explanation import Explanation
from .reduced_rank import reduced_rank_regression
from .selection import Selection
from .study import EXACT, Study


def explain(
    base: nn.Module,
    tuned: nn.Module,
    sae: Any,
    data: Batches,
    *,
    layer: int | None = None,
    module: str | None = None,
    held_out: Batches | None = None,
    n_features: int = 16,
    min_gain: float = 1e-3,
    ridge: float = 0.0,
) -> Explanation:
    """Fit a linear FSRL adapter to the difference between two models at one place.

    Features are chosen by what of the change they span (``selection.select_features``), and their
    steering is regressed on the base model's activations. Only second moments are kept. Changes
    that come after the place are not seen.

    Args:
        base: the base model.
        tuned: the fine-tuned model: another model of the same shape, or ``base`` with adapters
            (a ``PeftModel``; they are switched off where the base model is needed).
        sae: an SAE of the base model: a reference, live or frozen.
        data: batches of ``input_ids`` and ``attention_mask``.
        layer: the decoder layer at whose output to look; by default where the SAE was trained.
        module: path of a module to look at instead.
        held_out: what shares are measured on; None measures on ``data`` too.
        n_features: at most so many features.
        min_gain: no feature that adds less to the share in their span.
        ridge: of the regression; see ``reduced_rank_regression``.

    Raises:
        NotAffineError: for an SAE that normalises when it runs.
        TypeError: see ``capture.check_batches``.
        ValueError: if the models are the same, nothing changes at that place, or no feature holds
            anything of the change.
    """
    study = Study(base, tuned, sae, layer, module)
    adapter, selection = _fit(study, data, n_features, min_gain, ridge)
    return study.judge(adapter, selection, data if held_out is None else held_out)


def from_lora(
    base: nn.Module,
    lora: PeftModel | str | Path,
    sae: Any,
    data: Batches,
    *,
    layer: int | None = None,
    module: str | None = None,
    held_out: Batches | None = None,
    n_features: int = 16,
    min_gain: float = 1e-3,
    ridge: float = 0.0,
) -> Explanation:
    """Turn a LoRA into an FSRL adapter: by algebra where it acts where the SAE reads, else by fit.

    A LoRA on the very module whose output the SAE reads (a linear layer that is as wide as what it
    reads, or a projection from ``insert_projection``) becomes an adapter without any error if its
    ``B`` lies in the dictionary's span. With the chosen features alone if they span it, else with
    all. Any other LoRA is fitted as ``explain`` fits a fine-tune.

    Args:
        base: the base model.
        lora: ``base`` with a LoRA, or the folder or Hub id of one, which is taken off again.
        sae: see ``explain``.
        data: see ``explain``.
        layer: see ``explain``.
        module: see ``explain``.
        held_out: see ``explain``.
        n_features: see ``explain``.
        min_gain: see ``explain``.
        ridge: see ``explain``.
    """
    given = isinstance(lora, nn.Module)
    tuned: Any = lora if given else PeftModel.from_pretrained(base, str(lora))
    try:
        study = Study(base, tuned, sae, layer, module)
        factors = study.factors_at_place()
        if factors is None:
            adapter, selection = _fit(study, data, n_features, min_gain, ridge)
        else:
            selection = study.select(study.moments(data), n_features, min_gain)
            lora_A, lora_B, bias = factors
            few = selection.features
            adapter = from_factors(lora_A, lora_B, study.sae, bias=bias, features=few)
            if adapter.projection_error > EXACT:
                adapter = from_factors(lora_A, lora_B, study.sae, bias=bias)
        return study.judge(adapter, selection, data if held_out is None else held_out)
    finally:
        if not given:
            tuned.unload()


def _fit(
    study: Study, data: Batches, n_features: int, min_gain: float, ridge: float
) -> tuple[LinearAdapter, Selection]:
    """The features that span the change, and their steering by least squares."""
    moments = study.moments(data)
    selection = study.select(moments, n_features, min_gain)
    fit = reduced_rank_regression(moments, ridge=ridge)
    mean_x, mean_y = moments.mean
    adapter = from_factors(
        fit.full,
        torch.eye(len(mean_y), dtype=torch.float64),
        study.sae,
        bias=mean_y - fit.full @ mean_x,
        features=selection.features,
    )
    return adapter.merged(), selection
