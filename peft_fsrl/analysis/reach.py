"""What an adapter's weights can do at any input, and what they do at ordinary ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from ..equivalence.encoders import NotAffineError, affine_input
from .segments import active_adapter, only_layer

if TYPE_CHECKING:
    from jaxtyping import Float

# Tokens handled at once: of each, a few numbers per feature are held.
_CHUNK = 256
# Of the search for the activations that are moved most.
_STARTS, _STEPS = 8, 60


class AdapterView:
    """The active adapter of the one steering layer, feature by feature.

    Rows, biases and thresholds are such that a feature acts where ``rows @ x~ + bias`` exceeds its
    threshold, or lies below minus that if it is two-sided, and ``|v|`` is no more than that.
    ``decoder`` holds what one unit of each feature adds to the SAE's own input, ``sizes`` its norm.

    Raises:
        ValueError: for weights that are not finite, or an SAE that looks at earlier tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        layer = only_layer(model)
        self.layer_name, name = layer.layer_name, active_adapter(layer)
        adapter: Any = layer.fsrl_adapter[name]
        self._adapter = adapter
        weight = adapter.weight.detach()
        self.sae = layer.fsrl_sae[name].to(weight.device, layer.fsrl_sae[name].dtype)
        down = adapter.down
        self.rows = (weight if down is None else weight @ down.detach()).float()
        self.bias = adapter.bias.detach().float()
        self.two_sided = adapter.activation == "soft_threshold"
        self._jumps = adapter.activation == "jumprelu"
        threshold = adapter.threshold_parameter
        self.threshold = torch.zeros_like(self.bias)
        if adapter.activation == "gain":
            # g relu(u) is relu(|g| u) with the sign of g: a longer row.
            factor = threshold.detach().float().abs()
            self.rows, self.bias = self.rows * factor[:, None], self.bias * factor
        elif threshold is not None:
            theta = threshold.detach().float()
            self.threshold = theta.exp() if self._jumps else theta.clamp(min=0)
        if not all(each.isfinite().all() for each in (self.rows, self.bias, self.threshold)):
            raise ValueError(
                "Expected finite weights, found nan or inf in the adapter: its training diverged. "
                "Go back to an earlier checkpoint."
            )
        if self.sae.contextual:
            raise ValueError(
                "Expected an SAE that reads each token alone, found one of architecture "
                f"{self.sae.info.architecture!r}, which looks at earlier ones: what an adapter "
                "does at an activation does not follow from the activation alone."
            )
        scale = self.sae.feature_scale
        decoder = self.sae.W_dec if scale is None else self.sae.W_dec * scale[:, None]
        self.decoder = decoder.float()
        self.sizes = self.decoder.norm(dim=1)

    def read(self, x: Tensor) -> Float[Tensor, "tokens d_in"]:
        """What the adapter reads, ``x~``."""
        return self.sae.process_in(x).float()

    def steer(self, x: Float[Tensor, "tokens d_in"]) -> tuple[Tensor, Tensor, Tensor]:
        """``v``, the strength of each feature alone, and ``||x' - x|| / ||x||`` of each token."""
        adapter, sae = self._adapter, self.sae
        clamps = adapter.non_negative and not sae.signed
        steered = functional.steer(
            x,
            adapter.weight,
            adapter.bias,
            adapter.down,
            adapter.threshold_parameter,
            sae=sae,
            activation=adapter.activation,
            bandwidth=adapter.bandwidth,
            clamps=clamps,
            measures=False,
        )
        v = steered.steering_vector
        assert v is not None
        clipped = clamps and bool((v < 0).any())
        update = functional.clamped_update(v, sae.encode(x)) if clipped else v
        norms = x.norm(dim=-1, keepdim=True)
        scale = sae.token_scale(x)
        strength = update.abs() * self.sizes * (1.0 if scale is None else scale) / norms
        return v, strength, (steered.output - x).norm(dim=-1) / norms[..., 0]

    def largest(self, input_norm: float) -> Float[Tensor, "n_features"]:
        """What ``|v|`` cannot exceed where ``||x~||`` is no larger than this."""
        most = self.rows.norm(dim=1) * input_norm
        most = most + (self.bias.abs() if self.two_sided else self.bias)
        if self._jumps:
            return torch.where(most > self.threshold, most, 0.0)
        return torch.relu(most - self.threshold)

    def bound(self, norm: float) -> float | None:
        """What ``||x' - x|| / ||x||`` cannot exceed where ``||x||`` is this.

        ``|f' - f| <= |v| <= |u|``, feature by feature: the least of the sum of what each can do,
        and of two products of operator norms.
        """
        try:
            scale, shift = affine_input(self.sae)
        except NotAffineError:
            return None
        input_norm = abs(scale) * norm + float(shift.norm())
        largest, decoder = self.largest(input_norm).double(), _operator_norm(self.decoder)
        linear = _operator_norm(self.rows) * input_norm + float(self.bias.norm())
        bounds = (
            float((largest * self.sizes).sum()),
            decoder * float(largest.norm()),
            decoder * linear,
        )
        return min(bounds) / norm


class OrdinaryUse:
    """What an adapter does at ordinary tokens, summed a few tokens at a time.

    Attributes:
        norm: mean ``||x||``.
        input_norm: mean ``||x~||``.
        token_scale: mean factor of what is decoded.
        ratios: ``||x' - x|| / ||x||`` of each token.
        frequency: share of tokens at which each feature is steered.
        seen: largest strength of each feature.
        mean: of each feature's pre-activation.
        deviation: its standard deviation.
        typical: mean activation of each feature where the SAE finds it; of those never found, the
            mean of the others.
    """

    def __init__(self, view: AdapterView, states: Float[Tensor, "tokens d_in"]) -> None:
        wide = torch.zeros_like(view.bias, dtype=torch.float64)
        total, squares, acted, active, activity = (wide.clone() for _ in range(5))
        self.seen, ratios, read, scales = torch.zeros_like(view.bias), [], [], []
        for x in states.split(_CHUNK):
            v, strength, ratio = view.steer(x)
            self.seen = torch.maximum(self.seen, strength.amax(dim=0).to(self.seen))
            ratios.append(ratio)
            acted += (v != 0).sum(dim=0)
            inputs = view.read(x)
            u = functional.steering_pre(inputs, view.rows, view.bias).double()
            total += u.sum(dim=0)
            squares += u.square().sum(dim=0)
            f = view.sae.encode(x)
            active += (f != 0).sum(dim=0)
            activity += f.abs().double().sum(dim=0)
            read.append(inputs.norm(dim=-1))
            scale = view.sae.token_scale(x)
            scales.append(scale.flatten() if isinstance(scale, Tensor) else torch.ones(len(x)))
        self.ratios = torch.cat(ratios)
        self.norm = float(states.norm(dim=-1).mean())
        self.input_norm = float(torch.cat(read).mean())
        self.token_scale = float(torch.cat(scales).mean())
        self.frequency = acted / len(states)
        self.mean = total / len(states)
        self.deviation = (squares / len(states) - self.mean.square()).clamp(min=0).sqrt()
        typical = activity / active.clamp(min=1)
        average = activity.sum() / active.sum().clamp(min=1)
        self.typical = torch.where(active > 0, typical, average)

    def margins(self, view: AdapterView) -> Float[Tensor, "n_features"]:
        """Standard deviations from the mean pre-activation to the nearest place where it acts."""
        up = view.threshold - self.mean
        down = view.threshold + self.mean
        nearest = torch.minimum(up, down) if view.two_sided else up
        return nearest / self.deviation.clamp(min=torch.finfo(torch.float64).tiny)


def find_worst_ratio(
    view: AdapterView, ordinary: OrdinaryUse, states: Tensor, reach: Tensor
) -> float:
    """The largest ``||x' - x|| / ||x||`` that going uphill finds among ``x`` of ordinary norm."""
    first = states[ordinary.ratios.topk(min(_STARTS, len(states))).indices]
    rows = view.rows[reach.topk(min(_STARTS, len(reach))).indices]
    rows = rows[rows.norm(dim=-1) > 0]
    x = torch.cat([first, rows, -rows]).to(states)
    x = ordinary.norm * nn.functional.normalize(x, dim=-1)
    best = 0.0
    for step in range(_STEPS + 1):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            ratio = view.steer(x)[2]
            [gradient] = torch.autograd.grad(ratio.sum(), x)
        best = max(best, float(ratio.detach().max()))
        # Half the norm at first, less and less, so that it settles.
        size = 0.5 * ordinary.norm * (1 - step / (_STEPS + 1))
        moved = x.detach() + size * nn.functional.normalize(gradient, dim=-1)
        x = ordinary.norm * nn.functional.normalize(moved, dim=-1)
    return best


def _operator_norm(matrix: Float[Tensor, "n d"]) -> float:
    """The largest singular value, from the square of the smaller side, in float64."""
    wide = matrix.double()
    gram = wide.T @ wide if len(wide) > wide.shape[1] else wide @ wide.T
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())
