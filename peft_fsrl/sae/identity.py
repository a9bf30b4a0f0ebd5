"""Which SAE it is: what a saved config says of it, and a fingerprint that finds any change."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sae_lens import SAE

# Settings, beside the tensors, that decide what an SAE computes. A fixed list, so that a field that
# a later SAELens adds does not change the fingerprint of an SAE that did not change.
_FINGERPRINTED_SETTINGS = (
    "normalize_activations",
    "apply_b_dec_to_input",
    "k",
    "rescale_acts_by_decoder_norm",
    "residual_threshold",
    "max_iterations",
    "stop_on_duplicate_support",
    "n_heads",
    "sae_diff_type",
    "kval_topk",
    "tied_weights",
    "activation_normalization_factor",
)
# How much of a tensor is hashed at a time: at least so many rows, and so many bytes.
_ROWS, _PART = 16, 2**20


@dataclass(frozen=True)
class SAEInfo:
    """What identifies an SAE in a saved config.

    Attributes:
        d_in: width of the activations it reads and writes.
        d_sae: number of features.
        architecture: SAELens's name, for example ``"jumprelu"``.
        dtype: dtype of its tensors as loaded.
        fingerprint: SHA-256 over its tensors and the settings that decide what it computes.
        hook_name: where it was trained, in TransformerLens's words, if known.
        model_name: the model it was trained on, if known.
        neuronpedia_id: its id on Neuronpedia, if known.
    """

    d_in: int
    d_sae: int
    architecture: str
    dtype: str
    fingerprint: str
    hook_name: str | None = None
    model_name: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as the adapter's config stores them."""
        return asdict(self)


def compute_fingerprint(sae: SAE[Any]) -> str:
    """SHA-256 over an SAE's architecture, settings and tensors (name, dtype, shape and bytes)."""
    digest = hashlib.sha256()
    cfg = sae.cfg.to_dict()
    settings = {name: cfg[name] for name in _FINGERPRINTED_SETTINGS if name in cfg}
    digest.update(json.dumps([cfg["architecture"], settings], sort_keys=True).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        # In parts, for what is not contiguous or on another device has to be copied.
        whole = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
        row_bytes = max(1, whole[:1].numel() * whole.element_size())
        for part in whole.split(max(_ROWS, _PART // row_bytes)):
            digest.update(part.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
