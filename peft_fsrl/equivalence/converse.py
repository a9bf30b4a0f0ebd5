"""A LoRA in the dictionary's span is an FSRL adapter: the construction, and what it misses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ..sae.frozen import FrozenSAE
from ..sae.loading import take_sae
from ..steering import fsrl_layers
from ..tuner.adapter import SteeringAdapter
from ..tuner.config import FSRLConfig
from ..tuner.layer import FSRLLayer
from .encoders import affine_input

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class LinearAdapter:
    """An FSRL adapter that is linear: two-sided, threshold zero, without the clamp.

    Attributes:
        sae: the SAE, restricted to the features that it steers.
        weight: with ``down`` its second factor, without it whole.
        down: its first factor, or None.
        bias: of the pre-activations.
        projection_error: the share of ``B``'s Frobenius norm, and its bias's, that lies outside the
            span of the features' directions and is lost: 0 where the adapter equals the LoRA.
    """

    sae: FrozenSAE
    weight: Float[Tensor, "n_features rank"]
    down: Float[Tensor, "rank d_in"] | None
    bias: Float[Tensor, "n_features"]
    projection_error: float

    def config(self, sae: Any, **place: Any) -> FSRLConfig:
        """The adapter's config; arguments as for ``attach``."""
        return FSRLConfig(
            sae=sae,
            features=None if self.sae.features is None else list(self.sae.features),
            rank=None if self.down is None else len(self.down),
            activation="soft_threshold",
            non_negative=False,
            **place,
        )

    def merged(self) -> LinearAdapter:
        """The same with one whole weight in place of two factors."""
        if self.down is None:
            return self
        return replace(self, weight=self.weight @ self.down, down=None)

    def fill(self, layer: FSRLLayer, adapter_name: str) -> None:
        """Write the parameters into a layer that was made from ``config``."""
        adapter = layer.fsrl_adapter[adapter_name]
        assert isinstance(adapter, SteeringAdapter)
        with torch.no_grad():
            adapter.weight.copy_(self.weight)
            adapter.bias.copy_(self.bias)
            if adapter.down is not None and self.down is not None:
                adapter.down.copy_(self.down)
            threshold = adapter.threshold_parameter
            assert threshold is not None
            threshold.zero_()

    def attach(self, model: nn.Module, sae: Any, **place: Any) -> PeftModel:
        """The base model with this adapter, ready to steer and to save.

        Args:
            model: the base model.
            sae: the whole SAE, in any form that ``FSRLConfig`` takes.
            place: settings of the config that name one place, as ``layer`` or ``target_modules``.
        """
        steered = get_peft_model(model, self.config(sae, **place))
        [layer] = fsrl_layers(steered).values()
        self.fill(layer, "default")
        return steered.eval()


def from_factors(
    lora_A: Float[Tensor, "rank d_in"],
    lora_B: Float[Tensor, "d_in rank"],
    sae: Any,
    *,
    bias: Float[Tensor, "d_in"] | None = None,
    features: Sequence[int] | None = None,
) -> LinearAdapter:
    """The FSRL adapter that does ``x' = x + B A x + bias``, or comes nearest to it.

    With ``D`` the features' directions as rows, ``B = D^T G`` where ``B`` lies in their span. Then
    ``v = G A x`` decodes to ``B A x``; among all such ``G`` the smallest is taken.

    Args:
        lora_A: the LoRA's first factor; it reads the activations that the SAE reads.
        lora_B: its second factor, with the LoRA's scaling in it.
        sae: the SAE, as a reference, live or frozen.
        bias: the LoRA's bias.
        features: indices of the only features that may be used; None for all of the SAE's.

    Raises:
        NotAffineError: for an SAE that normalizes when it runs: ``x' - x`` would not be linear.
        ValueError: for factors that do not fit each other or the SAE.
    """
    sae = take_sae(sae)
    d_in = sae.info.d_in
    if lora_A.shape[1:] != (d_in,) or lora_B.shape != (d_in, len(lora_A)):
        raise ValueError(
            f"Expected A of shape (rank, {d_in}) and B of shape ({d_in}, rank), found "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    sae = sae.to(torch.device("cpu"), torch.float64)
    sae = sae if features is None else sae.restrict(features)
    scale, shift = affine_input(sae)
    wanted = lora_B.detach().to("cpu", torch.float64)
    constant = torch.zeros(d_in, 1, dtype=torch.float64)
    if bias is not None:
        constant = bias.detach().to("cpu", torch.float64)[:, None]
    wanted = torch.cat([wanted, constant], dim=1)
    solution = torch.linalg.pinv(sae.directions.T) @ wanted
    lost = (sae.directions.T @ solution - wanted).norm()
    down = lora_A.detach().to("cpu", torch.float64) / scale
    weight = solution[:, :-1].contiguous()
    size = wanted.norm()
    return LinearAdapter(
        sae=sae,
        weight=weight,
        down=down,
        bias=solution[:, -1] - weight @ (down @ shift),
        projection_error=float(lost / size) if size else 0.0,
    )
