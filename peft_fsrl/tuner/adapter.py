"""``SteeringAdapter``: what FSRL trains, as parameters without a forward."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import FSRLConfig
from .folder import compute_identity

_SMALL_START, _ENCODER_START = 1e-9, 0.02
_THRESHOLD_NAMES = {"soft_threshold": "threshold", "jumprelu": "log_threshold", "gain": "gain"}


class SteeringAdapter(nn.Module):
    """The trainable part of ``v = act_theta(x~ @ weight.T + bias)``.

    With ``config.rank`` the weight is ``weight @ down``.

    Args:
        d_in: width of the SAE's input.
        n_features: number of features that may be steered.
        config: read once, here.
        device: where the parameters live.
        dtype: dtype of the parameters.

    With the activation ``gain`` only the gains train; weight and bias are buffers, saved like
    parameters, that hold the SAE's encoder in float32 or wider.

    Shape:
        weight ``(n_features, d_in)``, bias and threshold, log_threshold or gain ``(n_features,)``;
        with a rank, weight ``(n_features, rank)`` and down ``(rank, d_in)``.
    """

    weight: Tensor
    bias: Tensor
    down: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        n_features: int,
        config: FSRLConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = config.activation
        # Whether it needs a trainer made by ``with_fsrl``; see ``PenaltyWatch``.
        self.penalized = config.penalizes or config.target_l0 is not None
        self.bandwidth = config.jumprelu_bandwidth
        self.min_gain = config.min_gain
        self.compiles = config.compile
        self.non_negative = config.non_negative
        self.register_parameter("down", None)
        # Saved with the weights, so that they are never loaded over other features.
        self.register_buffer("identity", torch.zeros(32, dtype=torch.uint8, device=device))
        if config.activation == "gain":
            # Zero steers nothing and still has a slope, unlike the other activations.
            self.gain = nn.Parameter(torch.zeros(n_features, device=device, dtype=dtype))
            # PEFT widens parameters of 16 bits, not buffers, and later: rounded by then, an encoder
            # would find other features than the SAE does.
            wide = torch.promote_types(dtype or torch.float32, torch.float32)
            weight = torch.empty(n_features, d_in, device=device, dtype=wide)
            self.register_buffer("weight", weight)
            self.register_buffer("bias", torch.empty(n_features, device=device, dtype=wide))
            return
        width = config.rank or d_in
        self.weight = nn.Parameter(torch.empty(n_features, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(n_features, device=device, dtype=dtype))
        scale = config.init_scale or _SMALL_START
        if config.activation == "jumprelu" and config.init_scale is None:
            scale = (config.init_threshold or config.jumprelu_bandwidth) * d_in**-0.5
        # In float16 a very small start would round to zero, from where nothing trains.
        scale = max(scale, torch.finfo(self.weight.dtype).smallest_normal / 64)
        nn.init.uniform_(self.weight, -scale, scale)
        if config.rank is not None:
            # Of unit size, so that the product starts as small as a full weight does.
            self.down = nn.Parameter(torch.empty(width, d_in, device=device, dtype=dtype))
            nn.init.normal_(self.down, std=width**-0.5)
        if config.activation == "relu":
            return
        start = config.init_threshold or 0.0
        if config.activation == "jumprelu":
            start = math.log(config.init_threshold or config.jumprelu_bandwidth)
        threshold = nn.Parameter(torch.full((n_features,), start, device=device, dtype=dtype))
        self.register_parameter(_THRESHOLD_NAMES[config.activation], threshold)

    @property
    def trains(self) -> bool:
        """Whether any of it is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def threshold_parameter(self) -> nn.Parameter | None:
        """What ``act`` has per feature: ``theta``, ``log(theta)``, the gain; None for ``relu``."""
        name = _THRESHOLD_NAMES.get(self.activation)
        # Not `get_parameter`: under FSDP, what stands under the name is a view and no parameter.
        return None if name is None else getattr(self, name)

    @torch.no_grad()
    def raise_thresholds(self, amount: float) -> None:
        """Add an amount to every threshold as it is stored, for ``jumprelu`` as its logarithm.

        None falls below zero. For ``relu`` the bias falls instead.
        """
        threshold = self.threshold_parameter
        if threshold is None:
            self.bias.sub_(amount)
        elif self.activation == "soft_threshold":
            threshold.clamp_(min=0).add_(amount).clamp_(min=0)
        else:
            threshold.add_(amount)

    def identify(self, fingerprint: str, features: tuple[int, ...] | None) -> None:
        """Note whose features the rows steer: the SAE's fingerprint, and which of its features."""
        identity = compute_identity(fingerprint, features, self.activation, self.non_negative)
        device = self.weight.device
        self.identity = identity if device.type == "meta" else identity.to(device)

    @torch.no_grad()
    def start_from_encoder(self, weight: Tensor, bias: Tensor, scale: float | None) -> None:
        """Start as a share of the SAE's own encoder.

        Args:
            weight: from ``FrozenSAE.encoder_rows``, shape of ``self.weight``.
            bias: from there, shape ``(n_features,)``.
            scale: the share; None for 0.02, and for all of it with ``gain``.
        """
        scale = scale or (1.0 if self.activation == "gain" else _ENCODER_START)
        self.weight.copy_(weight).mul_(scale)
        self.bias.copy_(bias).mul_(scale)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all features but those at some positions, in their order; parameters are new."""
        tensors = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if name not in ("down", "identity"):
                kept = tensor.detach()[rows.to(tensor.device)].clone()
                if isinstance(tensor, nn.Parameter):
                    kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
                setattr(self, name, kept)
