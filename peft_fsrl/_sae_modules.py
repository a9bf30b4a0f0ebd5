"""Building SAELens modules from the tensors of others, without copying what need not be copied."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import torch
    from sae_lens import SAE

# Along which dimension of each tensor the features lie.
_FEATURE_DIMENSION = {
    "W_enc": 1,
    "W_dec": 0,
    "b_enc": 0,
    "threshold": 0,
    "b_gate": 0,
    "b_mag": 0,
    "r_mag": 0,
}


def assemble(cfg_dict: dict[str, Any], state: dict[str, Tensor]) -> SAE[Any]:
    """A frozen SAE for inference from a config and tensors, which it shares."""
    from sae_lens import SAE

    reference = state["W_dec"]
    cfg_dict = deepcopy(cfg_dict)
    # A transformers module hands over heads already flattened: there is nothing to reshape.
    cfg_dict.update(device="meta", dtype=str(reference.dtype), reshape_activations="none")
    # The notice on how to load the model for TransformerLens does not concern transformers models.
    cfg_dict["metadata"].pop("model_from_pretrained_kwargs", None)
    sae = SAE.from_dict(cfg_dict)
    sae.load_state_dict(state, assign=True)
    sae.to(device=reference.device, dtype=reference.dtype)
    return sae.requires_grad_(False).eval()


def rebuild(
    module: SAE[Any], device: torch.device, dtype: torch.dtype, *, copy: bool = False
) -> SAE[Any]:
    """A frozen copy on ``device`` in ``dtype``, which shares storage where neither changes.

    With ``copy`` it never does.
    """
    state = {
        name: (tensor.clone() if tensor.is_inference() else tensor.detach()).to(
            device, dtype, copy=copy
        )
        for name, tensor in module.state_dict().items()
    }
    return assemble(module.cfg.to_dict(), state)


def slice_features(module: SAE[Any], rows: Tensor) -> SAE[Any]:
    """A frozen SAE with some features of one whose encoder is feature-wise."""
    rows = rows.to(module.W_dec.device)
    state = {
        name: tensor.index_select(_FEATURE_DIMENSION[name], rows) if name != "b_dec" else tensor
        for name, tensor in module.state_dict().items()
    }
    return assemble({**module.cfg.to_dict(), "d_sae": len(rows)}, state)


def view_features(module: SAE[Any], features: slice) -> SAE[Any]:
    """A stand-in that shares its tensors and encodes some features only; it cannot decode."""
    view = copy(module)
    view._parameters = {
        name: tensor
        if tensor is None or name not in _FEATURE_DIMENSION
        else tensor.narrow(_FEATURE_DIMENSION[name], features.start, features.stop - features.start)
        for name, tensor in module._parameters.items()
    }
    return view


def decoder_feature_scale(module: SAE[Any]) -> Tensor | None:
    """By which each feature is multiplied before it is decoded, ``(d_sae,)``; None for 1."""
    if getattr(module.cfg, "rescale_acts_by_decoder_norm", False):
        return 1 / module.W_dec.norm(dim=-1)
    return None


def constant_token_factor(module: SAE[Any]) -> float | None:
    """By which what is decoded is multiplied, the same for every token; None for 1."""
    if module.cfg.normalize_activations == "constant_scalar_rescale":
        return 1 / module.cfg.activation_normalization_factor
    return None
