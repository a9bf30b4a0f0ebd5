"""The frozen sparse autoencoder as a steering layer needs it: loading, identity, sharing.

A ``FrozenSAE`` is immutable: moving it to another device or dtype gives another object, shared
process-wide by everything that needs the same SAE there.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import functional

if TYPE_CHECKING:
    from jaxtyping import Float
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
_SIGNED_ARCHITECTURES = frozenset({"abstopk"})
_CONTEXTUAL_ARCHITECTURES = frozenset({"temporal"})
# Written by SAELens's run-time normalisation during encode and read back in decode, which steering
# never calls: left in place they would keep the last batch, and its graph, alive.
_NORMALISATION_STATE = ("x_norm_coeff", "ln_mu", "ln_std")

_INSTANCES: WeakValueDictionary[tuple[SAEInfo, str, str, tuple[str, ...]], FrozenSAE] = (
    WeakValueDictionary()
)


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
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{data.dtype}:{tuple(data.shape)};".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FrozenSAE:
    """A frozen SAE on one device in one dtype.

    Args:
        module: a SAELens inference SAE. Its tensors are shared, not copied.
        info: its identity.
        rounding: the narrower dtypes that its tensors have passed since ``info`` was taken.

    Attributes:
        info: see ``SAEInfo``.
        signed: feature activations may be negative (``abstopk``), so steering does not clamp them.
        contextual: ``encode`` looks at earlier tokens (``temporal``), so it needs whole sequences.
    """

    def __init__(self, module: SAE[Any], info: SAEInfo, rounding: tuple[str, ...] = ()) -> None:
        self.info = info
        self.signed = info.architecture in _SIGNED_ARCHITECTURES
        self.contextual = info.architecture in _CONTEXTUAL_ARCHITECTURES
        self._module = module
        self._rounding = rounding
        self._normalisation: str = module.cfg.normalize_activations
        self._feature_scale = _decoder_feature_scale(module)
        self._token_factor = _constant_token_factor(module)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._module.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which it computes."""
        return self._module.W_dec.dtype

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """Decoder rows: the residual-stream direction of each feature, shape ``(d_sae, d_in)``."""
        return self._module.W_dec

    @property
    def module(self) -> SAE[Any]:
        """The SAELens object itself, for analyses; it must not be modified."""
        return self._module

    def process_in(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The SAE's own input processing: cast, normalisation, subtraction of ``b_dec``."""
        processed: Tensor = self._module.process_sae_in(x)
        self._forget_normalisation_state()
        return processed

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations of the raw activations ``x``, by SAELens's own ``encode``."""
        feature_acts: Tensor = self._module.encode(x)
        self._forget_normalisation_state()
        return feature_acts

    def decode_update(
        self, update: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_in"]:
        """``decode(f + update) - decode(f)`` at the token whose raw activations are ``x``."""
        scale = functional.normalisation_scale(x.to(self.dtype), self._normalisation)
        delta = functional.decode_update(
            update.to(self.dtype), self._module.W_dec, self._feature_scale, scale
        )
        return delta if self._token_factor is None else delta * self._token_factor

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenSAE:
        """The same SAE on another device or in another dtype, shared with whoever asks for it."""
        finest = getattr(torch, self._rounding[-1] if self._rounding else self.info.dtype)
        # What bfloat16 has rounded stays rounded in float32: it must not be taken for the original.
        exact = torch.promote_types(finest, dtype) == dtype
        rounding = self._rounding if exact else (*self._rounding, str(dtype).removeprefix("torch."))
        return _share(
            self.info, device, dtype, rounding, lambda: _rebuild(self._module, device, dtype)
        )

    def save(self, directory: str | Path) -> None:
        """Write the SAE in SAELens's format (``cfg.json`` and ``sae_weights.safetensors``)."""
        self._module.save_model(directory)

    def _forget_normalisation_state(self) -> None:
        for name in _NORMALISATION_STATE:
            self._module.__dict__.pop(name, None)

    def __copy__(self) -> FrozenSAE:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenSAE:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # SAELens modules hold closures, which do not pickle.
        state = self._module.state_dict()
        return _unpickle, (self._module.cfg.to_dict(), state, self.info, self._rounding)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"FrozenSAE({info.architecture}, d_in={info.d_in}, d_sae={info.d_sae}, "
            f"{info.hook_name}, {self.dtype}, {self.device})"
        )


def freeze_sae(sae: SAE[Any]) -> FrozenSAE:
    """Take a live SAELens SAE as it is; its tensors are shared, not copied.

    Args:
        sae: an inference SAE that reads and writes the same activations.

    Raises:
        TypeError: for anything but a SAELens inference SAE (training SAEs, transcoders).
    """
    from sae_lens import SAE, TrainingSAE, Transcoder

    if isinstance(sae, TrainingSAE):
        raise TypeError(
            f"Expected an inference SAE, got the training class {type(sae).__name__}, whose "
            "activations may depend on the whole batch. Save it with "
            "`sae.save_inference_model(path)` and pass the path."
        )
    if isinstance(sae, Transcoder):
        raise TypeError(
            f"Expected an SAE that reads and writes one hook point, got {type(sae).__name__}: a "
            "transcoder reads the input of an MLP and writes its output, so there is no residual "
            "stream in which its decoder could undo its encoder. Use an SAE."
        )
    if not isinstance(sae, SAE):
        raise TypeError(f"Expected a sae_lens.SAE, got {type(sae).__name__}.")
    info = SAEInfo(
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        architecture=sae.cfg.architecture(),
        dtype=str(sae.W_dec.dtype).removeprefix("torch."),
        fingerprint=compute_fingerprint(sae),
        hook_name=_optional_str(sae.cfg.metadata.hook_name),
        model_name=_optional_str(sae.cfg.metadata.model_name),
        neuronpedia_id=_optional_str(sae.cfg.metadata.neuronpedia_id),
    )
    device, dtype = sae.W_dec.device, sae.W_dec.dtype
    return _share(info, device, dtype, (), lambda: _rebuild(sae, device, dtype))


def _optional_str(value: Any) -> str | None:
    return None if value is None else str(value)


def _rebuild(module: SAE[Any], device: torch.device, dtype: torch.dtype) -> SAE[Any]:
    """A frozen copy on ``device`` in ``dtype`` that shares storage where neither changes."""
    state = {
        name: (tensor.clone() if tensor.is_inference() else tensor.detach()).to(device, dtype)
        for name, tensor in module.state_dict().items()
    }
    return _assemble(module.cfg.to_dict(), state)


def _assemble(cfg_dict: dict[str, Any], state: dict[str, Tensor]) -> SAE[Any]:
    from sae_lens import SAE

    reference = state["W_dec"]
    cfg_dict = copy.deepcopy(cfg_dict)
    # A transformers module hands over heads already flattened: there is nothing to reshape.
    cfg_dict.update(device="meta", dtype=str(reference.dtype), reshape_activations="none")
    # The notice on how to load the model for TransformerLens does not concern transformers models.
    cfg_dict["metadata"].pop("model_from_pretrained_kwargs", None)
    sae = SAE.from_dict(cfg_dict)
    sae.load_state_dict(state, assign=True)
    sae.to(device=reference.device, dtype=reference.dtype)
    return sae.requires_grad_(False).eval()


def _unpickle(
    cfg_dict: dict[str, Any],
    state: dict[str, Tensor],
    info: SAEInfo,
    rounding: tuple[str, ...],
) -> FrozenSAE:
    device, dtype = state["W_dec"].device, state["W_dec"].dtype
    return _share(info, device, dtype, rounding, lambda: _assemble(cfg_dict, state))


def _share(
    info: SAEInfo,
    device: torch.device,
    dtype: torch.dtype,
    rounding: tuple[str, ...],
    build: Callable[[], SAE[Any]],
) -> FrozenSAE:
    """The process's one copy of an SAE on a device in a dtype, built if nobody holds it yet."""
    key = (info, str(device), str(dtype), rounding)
    found = _INSTANCES.get(key)
    if found is None:
        # Tensors made under inference mode could never take part in a later training step.
        with torch.inference_mode(False), torch.no_grad():
            found = FrozenSAE(build(), info, rounding)
        _INSTANCES[key] = found
    return found


def _decoder_feature_scale(module: SAE[Any]) -> Tensor | None:
    if getattr(module.cfg, "rescale_acts_by_decoder_norm", False):
        return 1 / module.W_dec.norm(dim=-1)
    return None


def _constant_token_factor(module: SAE[Any]) -> float | None:
    if module.cfg.normalize_activations == "constant_scalar_rescale":
        return 1 / module.cfg.activation_normalization_factor
    return None
