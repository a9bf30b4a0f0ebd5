"""The frozen sparse autoencoder as a steering layer needs it: encode, decode, identity, sharing.

A ``FrozenSAE`` is immutable: moving it to another device or dtype gives another object, shared
process-wide by everything that needs the same SAE there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .. import functional

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from sae_lens import SAE

_SIGNED_ARCHITECTURES = frozenset({"abstopk"})
# Each feature's activation depends on its own tensors alone: some can be had without the others.
_FEATUREWISE_ARCHITECTURES = frozenset({"standard", "gated", "jumprelu"})
_CONTEXTUAL_ARCHITECTURES = frozenset({"temporal"})
# Written by SAELens's run-time normalization during encode and read back in decode, which steering
# never calls: left in place they would keep the last batch, and its graph, alive.
_NORMALISATION_STATE = ("x_norm_coeff", "ln_mu", "ln_std")

# Along which dimension of each tensor of such an SAE the features lie.
_FEATURE_DIMENSION = {
    "W_enc": 1,
    "W_dec": 0,
    "b_enc": 0,
    "threshold": 0,
    "b_gate": 0,
    "b_mag": 0,
    "r_mag": 0,
}
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

_INSTANCES: WeakValueDictionary[tuple[Any, ...], FrozenSAE] = WeakValueDictionary()


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


class FrozenSAE:
    """A frozen SAE on one device in one dtype.

    Args:
        module: a SAELens inference SAE that nobody else modifies.
        info: its identity.
        rounding: the narrower dtypes that its tensors have passed since ``info`` was taken.
        features: the features that it is restricted to, ascending; None for all.

    Attributes:
        info: see ``SAEInfo``.
        features: as given.
        signed: feature activations may be negative (``abstopk``), so steering does not clamp them.
        contextual: ``encode`` looks at earlier tokens (``temporal``), so it needs whole sequences.
        feature_scale: factor of each feature when it is decoded, ``(n_features,)``, or None for 1.
    """

    def __init__(
        self,
        module: SAE[Any],
        info: SAEInfo,
        rounding: tuple[str, ...] = (),
        features: tuple[int, ...] | None = None,
    ) -> None:
        self.info = info
        self.features = features
        self.signed = info.architecture in _SIGNED_ARCHITECTURES
        self.contextual = info.architecture in _CONTEXTUAL_ARCHITECTURES
        self._module = module
        self._rounding = rounding
        self._normalization: str = module.cfg.normalize_activations
        self.feature_scale = _decoder_feature_scale(module)
        self._token_factor = _constant_token_factor(module)
        self._W_dec: Tensor = module.W_dec
        # What a feature-wise encoder does not need is gone from the module; the others compete for
        # their activations, so all are encoded and some are kept.
        self._columns: Tensor | None = None
        if features is not None and not _is_featurewise(info):
            self._columns = torch.tensor(features, dtype=torch.long, device=module.W_dec.device)
            self._W_dec = module.W_dec[self._columns]
            if self.feature_scale is not None:
                self.feature_scale = self.feature_scale[self._columns]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._module.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which it computes."""
        return self._module.W_dec.dtype

    @property
    def W_dec(self) -> Float[Tensor, "n_features d_in"]:
        """Decoder rows, the residual-stream direction of each feature: ``(n_features, d_in)``."""
        return self._W_dec

    @property
    def directions(self) -> Float[Tensor, "n_features d_in"]:
        """What one unit of each feature adds to ``x``, but for a token's own scale."""
        scale, factor = self.feature_scale, self._token_factor
        rows = self._W_dec if scale is None else self._W_dec * scale[:, None]
        return rows if factor is None else rows * factor

    @property
    def n_features(self) -> int:
        """How many features it has: ``d_sae``, or fewer where it is restricted."""
        return self._W_dec.shape[0]

    @property
    def feature_index(self) -> Int[Tensor, "n_features"]:
        """The index in the whole SAE of each of its features, ascending, on the CPU."""
        if self.features is None:
            return torch.arange(self.n_features)
        return torch.tensor(self.features, dtype=torch.long)

    def positions(self, features: Iterable[int]) -> Int[Tensor, "found"]:
        """Where some features of the whole SAE stand among its own; those it lacks are left out.

        Raises:
            IndexError: for an index that the whole SAE does not have.
        """
        wanted = _check_features(features, self.info)
        if self.features is None:
            return torch.tensor(wanted, dtype=torch.long)
        place = {feature: position for position, feature in enumerate(self.features)}
        return torch.tensor([place[f] for f in wanted if f in place], dtype=torch.long)

    def restrict(self, features: Iterable[int]) -> FrozenSAE:
        """The same SAE with some of its features: the others are neither read nor written.

        A feature-wise encoder (standard, gated, jumprelu) then costs memory and time in proportion.

        Raises:
            IndexError: for an index that the SAE does not have.
            ValueError: for no feature, or a feature that was already left out.
        """
        chosen = _check_features(features, self.info)
        rows = self.positions(chosen)
        if not chosen or len(rows) < len(chosen):
            raise ValueError(
                f"Expected features among the {self.n_features} that this SAE has, at least one; "
                f"got {chosen[:10]}."
            )
        return _share(
            self.info,
            self.device,
            self.dtype,
            self._rounding,
            tuple(chosen),
            lambda: (
                _slice_features(self._module, rows) if _is_featurewise(self.info) else self._module
            ),
        )

    @property
    def module(self) -> SAE[Any]:
        """The SAELens object itself, for analyses; it must not be modified."""
        return self._module

    def process_in(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The SAE's own input processing: cast, normalization, subtraction of ``b_dec``."""
        processed: Tensor = self._module.process_sae_in(x)
        self._forget_normalization_state()
        return processed

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_features"]:
        """Feature activations of the raw activations ``x``, by SAELens's own ``encode``."""
        feature_acts: Tensor = self._module.encode(x)
        self._forget_normalization_state()
        return feature_acts if self._columns is None else feature_acts[..., self._columns]

    def encoder_rows(self) -> tuple[Float[Tensor, "n_features d_in"], Float[Tensor, "n_features"]]:
        """``W`` and ``b`` with ``process_in(x) @ W.T + b > 0`` exactly where a feature is active.

        For ``gated`` SAEs they are those of the gate.

        Raises:
            ValueError: for an SAE whose features compete for their activation.
        """
        if not _is_featurewise(self.info):
            raise ValueError(
                "init_weights='encoder' and activation='gain' need an SAE whose features have an "
                f"encoder of their own ({', '.join(sorted(_FEATUREWISE_ARCHITECTURES))}), found "
                f"{self.info.architecture!r}, whose features compete for their activation. Use "
                "init_weights='uniform' and another activation."
            )
        if self.info.architecture == "gated":
            return self._module.W_enc.T, self._module.b_gate
        if self.info.architecture == "standard":
            return self._module.W_enc.T, self._module.b_enc
        # A feature is never negative, whatever its threshold.
        return self._module.W_enc.T, self._module.b_enc - self._module.threshold.relu()

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Tensor, Tensor]:
        """Feature activations of ``x`` and what SAELens's own ``decode`` makes of them."""
        feature_acts: Tensor = self._module.encode(x)
        reconstruction: Tensor = self._module.decode(feature_acts)
        self._forget_normalization_state()
        return feature_acts, reconstruction

    def decode_update(
        self, update: Float[Tensor, "*batch n_features"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_in"]:
        """``decode(f + update) - decode(f)`` at the token whose raw activations are ``x``."""
        scale = self.token_scale(x)
        return functional.decode_update(
            update.to(self.dtype), self._W_dec, self.feature_scale, scale
        )

    def token_scale(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch 1"] | float | None:
        """Factor of what is decoded at the token whose raw activations are ``x``; None for 1."""
        if self._token_factor is not None:
            return self._token_factor
        return functional.normalization_scale(x.to(self.dtype), self._normalization)

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenSAE:
        """The same SAE on another device or in another dtype, shared with whoever asks for it."""
        finest = getattr(torch, self._rounding[-1] if self._rounding else self.info.dtype)
        # What bfloat16 has rounded stays rounded in float32: it must not be taken for the original.
        exact = torch.promote_types(finest, dtype) == dtype
        rounding = self._rounding if exact else (*self._rounding, str(dtype).removeprefix("torch."))
        return _share(
            self.info,
            device,
            dtype,
            rounding,
            self.features,
            lambda: _rebuild(self._module, device, dtype),
        )

    def save(self, directory: str | Path) -> None:
        """Write the SAE in SAELens's format (``cfg.json`` and ``sae_weights.safetensors``).

        Raises:
            ValueError: for an SAE restricted to some features, which is not the whole.
        """
        if self.features is not None:
            raise ValueError(f"Only a whole SAE can be saved; this one has {self.n_features}.")
        self._module.save_model(directory)

    def _forget_normalization_state(self) -> None:
        for name in _NORMALISATION_STATE:
            self._module.__dict__.pop(name, None)

    def __copy__(self) -> FrozenSAE:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenSAE:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # SAELens modules hold closures, which do not pickle.
        state = self._module.state_dict()
        cfg = self._module.cfg.to_dict()
        return _unpickle, (cfg, state, self.info, self._rounding, self.features)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"FrozenSAE({info.architecture}, d_in={info.d_in}, d_sae={info.d_sae}, "
            f"n_features={self.n_features}, {info.hook_name}, {self.dtype}, {self.device})"
        )


def share_sae(sae: SAE[Any], info: SAEInfo, *, copy: bool) -> FrozenSAE:
    """The process's one frozen copy of an SAE; without ``copy`` it takes over its tensors."""
    device, dtype = sae.W_dec.device, sae.W_dec.dtype
    return _share(info, device, dtype, (), None, lambda: _rebuild(sae, device, dtype, copy=copy))


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


def _check_features(features: Iterable[int], info: SAEInfo) -> list[int]:
    chosen = sorted({int(feature) for feature in features})
    outside = [feature for feature in chosen if not 0 <= feature < info.d_sae]
    if outside:
        raise IndexError(
            f"Feature {outside[0]} does not exist: the SAE has features 0 to {info.d_sae - 1}."
        )
    return chosen


def _unpickle(
    cfg_dict: dict[str, Any],
    state: dict[str, Tensor],
    info: SAEInfo,
    rounding: tuple[str, ...],
    features: tuple[int, ...] | None,
) -> FrozenSAE:
    device, dtype = state["W_dec"].device, state["W_dec"].dtype
    return _share(info, device, dtype, rounding, features, lambda: _assemble(cfg_dict, state))


def _share(
    info: SAEInfo,
    device: torch.device,
    dtype: torch.dtype,
    rounding: tuple[str, ...],
    features: tuple[int, ...] | None,
    build: Callable[[], SAE[Any]],
) -> FrozenSAE:
    """The process's one copy of an SAE on a device in a dtype, built if nobody holds it yet."""
    key = (info, str(device), str(dtype), rounding, features)
    found = _INSTANCES.get(key)
    if found is None:
        # Tensors made under inference mode could never take part in a later training step.
        with torch.inference_mode(False), torch.no_grad():
            found = FrozenSAE(build(), info, rounding, features)
        _INSTANCES[key] = found
    return found


def _assemble(cfg_dict: dict[str, Any], state: dict[str, Tensor]) -> SAE[Any]:
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


def _rebuild(
    module: SAE[Any], device: torch.device, dtype: torch.dtype, *, copy: bool = False
) -> SAE[Any]:
    """A frozen copy on ``device`` in ``dtype``, which shares storage where neither changes.

    With ``copy`` it never does.
    """
    state = {}
    for name, tensor in module.state_dict().items():
        moved = tensor.detach().to(device, dtype, copy=copy)
        # A tensor of inference mode could never take part in a later training step.
        state[name] = moved.clone() if moved.is_inference() else moved
    return _assemble(module.cfg.to_dict(), state)


def _slice_features(module: SAE[Any], rows: Tensor) -> SAE[Any]:
    """A frozen SAE with some features of one whose encoder is feature-wise."""
    rows = rows.to(module.W_dec.device)
    state = {
        name: tensor.index_select(_FEATURE_DIMENSION[name], rows)
        if name in _FEATURE_DIMENSION
        else tensor
        for name, tensor in module.state_dict().items()
    }
    return _assemble({**module.cfg.to_dict(), "d_sae": len(rows)}, state)


def _is_featurewise(info: SAEInfo) -> bool:
    return info.architecture in _FEATUREWISE_ARCHITECTURES


def _decoder_feature_scale(module: SAE[Any]) -> Tensor | None:
    """By which each feature is multiplied before it is decoded, ``(d_sae,)``; None for 1."""
    if getattr(module.cfg, "rescale_acts_by_decoder_norm", False):
        return 1 / module.W_dec.norm(dim=-1)
    return None


def _constant_token_factor(module: SAE[Any]) -> float | None:
    """By which what is decoded is multiplied, the same for every token; None for 1."""
    if module.cfg.normalize_activations == "constant_scalar_rescale":
        return 1 / module.cfg.activation_normalization_factor
    return None
