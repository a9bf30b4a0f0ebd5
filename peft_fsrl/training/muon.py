"""Muon for the adapter's matrices, AdamW for all else that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MATRIX = 2


class MuonAdamW(torch.optim.AdamW):
    """``torch.optim.Muon`` on parameters of two dimensions, AdamW on biases and thresholds.

    Muon's step is an orthogonal matrix, scaled so that its entries are as large as AdamW's
    (``adjust_lr_fn="match_rms_adamw"``): one learning rate serves both. One optimizer with one
    state, so that it goes into checkpoints, schedulers and groups as any other does.

    Args:
        params: as for every optimizer.
        lr: learning rate of both.
        momentum: of Muon.
        settings: of AdamW, of which Muon takes ``weight_decay``.

    Raises:
        ImportError: before torch 2.9, which has no Muon.

    Example:
        ``trainer.optimizer_cls_and_kwargs = (MuonAdamW, {"lr": trainer.args.learning_rate})``,
        before ``trainer.train()``.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, *, momentum: float = 0.95, **settings: Any
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(
                f"Expected torch 2.9 or later, which has Muon, found {torch.__version__}. Update "
                "torch, or train with AdamW."
            )
        super().__init__(params, lr=lr, **settings)
        self.defaults["momentum"] = momentum
        for group in self.param_groups:
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of both; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hidden: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.ndim == _MATRIX and p.grad is not None]
            if not matrices:
                continue
            muon = torch.optim.Muon(
                matrices,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                adjust_lr_fn="match_rms_adamw",
            )
            muon.state = self.state
            muon.step()
            for parameter in matrices:
                # AdamW looks for it when a state is loaded.
                self.state[parameter].setdefault("step", torch.zeros(())).add_(1)
            hidden += [(p, p.grad) for p in matrices]
        # AdamW leaves alone what has no gradient.
        for parameter, _ in hidden:
            parameter.grad = None
        try:
            super().step()
        finally:
            for parameter, gradient in hidden:
                parameter.grad = gradient
        return loss
