"""Building SAELens modules from the tensors of others, without copying what need not be copied.

Encoder weights are kept with the elements of each column, which belong to one feature, side by
side, and not those of each row as SAELens leaves them. Shapes and values are the same; some columns
can then be read without touching the others, and a whole product takes no longer.
"""

from __future__ import annotations

from copy import copy, deepcopy
from pathlib import Path
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

    With ``copy`` it never does. An encoder that does not have its columns side by side is copied.
    """
    state = {}
    for name, tensor in module.state_dict().items():
        laid_out = _by_columns(name, tensor.detach())
        fresh = laid_out.data_ptr() != tensor.data_ptr()
        if tensor.is_inference() and not fresh:
            laid_out, fresh = laid_out.clone(), True
        state[name] = laid_out.to(device, dtype, copy=copy and not fresh)
    return assemble(module.cfg.to_dict(), state)


def slice_features(module: SAE[Any], rows: Tensor) -> SAE[Any]:
    """A frozen SAE with some features of one whose encoder is feature-wise."""
    rows = rows.to(module.W_dec.device)
    state = {name: _select(name, tensor, rows) for name, tensor in module.state_dict().items()}
    return assemble({**module.cfg.to_dict(), "d_sae": len(rows)}, state)


def view_features(module: SAE[Any], features: Tensor | slice) -> SAE[Any]:
    """A stand-in for a module with a feature-wise encoder, whose ``encode`` knows some features.

    A slice of them shares its tensors. It cannot decode.
    """
    encoder = {
        name: _select(name, tensor, features)
        for name, tensor in module._parameters.items()
        if tensor is not None and name != "W_dec"
    }
    return _with_tensors(module, encoder)


def save_module(module: SAE[Any], directory: str | Path) -> None:
    """Write a module in SAELens's format, its tensors laid out as SAELens leaves them."""
    tensors = {name: t.contiguous() for name, t in module._parameters.items() if t is not None}
    _with_tensors(module, tensors).save_model(directory)


def load_folder(directory: Path) -> SAE[Any]:
    """Read an SAE in SAELens's format; what it lays out anew does not stay in memory twice."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader

    def load(*args: Any, **kwargs: Any) -> Any:
        _, state = sae_lens_disk_loader(*args, **kwargs)
        encoder = {k: _by_columns(k, tensor) for k, tensor in state.items() if k == "W_enc"}
        # Tensors are views of the mapped file, of which what was read counts as memory for as long
        # as one of them lives: the rest comes from another mapping.
        del state
        cfg_dict, state = sae_lens_disk_loader(*args, **kwargs)
        return cfg_dict, {**state, **encoder}

    return SAE.load_from_disk(directory, converter=load)


def _by_columns(name: str, tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T if name == "W_enc" and tensor.ndim == 2 else tensor


def _select(name: str, tensor: Tensor, features: Tensor | slice) -> Tensor:
    if name not in _FEATURE_DIMENSION:
        return tensor
    if _FEATURE_DIMENSION[name] == 1:
        return tensor.T[features].T
    return tensor[features]


def _with_tensors(module: SAE[Any], tensors: dict[str, Tensor]) -> SAE[Any]:
    other = copy(module)
    other._parameters = tensors
    return other


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
