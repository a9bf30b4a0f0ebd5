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


def view_features(module: SAE[Any], columns: Tensor) -> SAE[Any]:
    """A stand-in for a module with a feature-wise encoder, whose ``encode`` knows some features.

    Only the tensors of the encoder are sliced; it cannot decode.
    """
    view = copy(module)
    view._parameters = {
        name: tensor.index_select(_FEATURE_DIMENSION[name], columns)
        if name in _FEATURE_DIMENSION and name != "W_dec"
        else tensor
        for name, tensor in module._parameters.items()
        if tensor is not None
    }
    return view


def slice_features(module: SAE[Any], rows: Tensor) -> SAE[Any]:
    """A frozen SAE with some features of one whose encoder is feature-wise."""
    rows = rows.to(module.W_dec.device)
    state = {
        name: tensor.index_select(_FEATURE_DIMENSION[name], rows) if name != "b_dec" else tensor
        for name, tensor in module.state_dict().items()
    }
    return assemble({**module.cfg.to_dict(), "d_sae": len(rows)}, state)
