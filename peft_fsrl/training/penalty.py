"""The sparsity penalty of one forward pass: what is added to the preference loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import masked_mean
from ..steering import ForwardRecord, TokenStatistics, adapter_configs


def warm_up(config: Any, state: Any) -> float:
    """``min(1, step / warm-up steps)``: the share of an adapter's penalty that is in force.

    Args:
        config: an ``FSRLConfig``.
        state: of a trainer.
    """
    steps = math.ceil(config.penalty_warmup_ratio * state.max_steps)
    return min(1.0, state.global_step / steps) if steps else 1.0


class SparsityPenalty:
    """``mean_t (l1_coeff ||v_t||_1 + l2_coeff ||v_t||_2^2 + l0_coeff #open gates)``, real tokens.

    Summed over the layers that an adapter steers. Padding never counts.

    Args:
        model: a model with FSRL adapters, whose configs give the coefficients. They are read at
            every call, so that adapters may be added and coefficients changed at any time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, record: ForwardRecord, scales: Mapping[str, float] | None = None) -> Tensor:
        """The penalty of one forward pass, a scalar with that pass's graph.

        Args:
            record: from a ``SteeringMonitor``.
            scales: factor of all coefficients by adapter; 1 where it names none.

        Raises:
            RuntimeError: the pass was made in training mode and steered by a trainable adapter, but
                the penalty is detached and would not affect training.
        """
        configs, terms = adapter_configs(self._model), []
        for tokens in record.tokens:
            config = configs[tokens.adapter_name]
            mask = None if record.mask is None else record.mask.to(tokens.l1.device)
            term = config.l1_coeff * masked_mean(tokens.l1, mask, config.penalty_reduction)
            if config.l2_coeff:
                squares = masked_mean(tokens.l2.square(), mask, config.penalty_reduction)
                term = term + config.l2_coeff * squares
            if tokens.open_gates is not None and config.l0_coeff:
                gates = masked_mean(tokens.open_gates, mask, config.penalty_reduction)
                term = term + config.l0_coeff * gates
            if record.training and not term.requires_grad:
                self._require_graph(tokens)
            terms.append(term * (scales or {}).get(tokens.adapter_name, 1.0))
        device = terms[0].device
        return torch.stack([term.to(device) for term in terms]).sum()

    def _require_graph(self, tokens: TokenStatistics) -> None:
        mark = f".{tokens.adapter_name}."
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and "fsrl_" in name and mark in name:
                raise RuntimeError(
                    f"The sparsity penalty of adapter '{tokens.adapter_name}' at "
                    f"'{tokens.layer_name}' is detached and would not affect training. A "
                    "reentrant gradient checkpoint around that module does this: use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
