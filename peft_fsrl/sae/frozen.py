"""The frozen sparse autoencoder as a steering layer needs it: loading, identity, sharing.

A ``FrozenSAE`` is immutable: moving it to another device or dtype gives another object, shared
process-wide by everything that needs the same SAE there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .. import functional
from .._sparse import columns_to_read, sparse_product
from .identity import SAEInfo
from .modules import (
    assemble,
    constant_token_factor,
    decoder_feature_scale,
    rebuild,
    save_module,
    slice_features,
    view_features,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from sae_lens import SAE

_SIGNED_ARCHITECTURES = frozenset({"abstopk"})
_FEATUREWISE_ARCHITECTURES = frozenset({"standard", "gated", "jumprelu"})
_CONTEXTUAL_ARCHITECTURES = frozenset({"temporal"})
# Written by SAELens's run-time normalisation during encode and read back in decode, which steering
# never calls: left in place they would keep the last batch, and its graph, alive.
_NORMALISATION_STATE = ("x_norm_coeff", "ln_mu", "ln_std")

_INSTANCES: WeakValueDictionary[tuple[Any, ...], FrozenSAE] = WeakValueDictionary()


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
        featurewise: each feature's activation depends on its own tensors alone.
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
        self.featurewise = info.architecture in _FEATUREWISE_ARCHITECTURES
        self._module = module
        self._rounding = rounding
        self._normalisation: str = module.cfg.normalize_activations
        self.feature_scale = decoder_feature_scale(module)
        self._token_factor = constant_token_factor(module)
        self._W_dec: Tensor = module.W_dec
        # What a feature-wise encoder does not need is gone from the module; the others compete for
        # their activations, so all are encoded and some are kept.
        self._columns: Tensor | None = None
        if features is not None and not self.featurewise:
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
    def n_encoded(self) -> int:
        """How many features its encoder gives: some are dropped where it is not ``featurewise``."""
        return self.n_features if self._columns is None else self.info.d_sae

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
            lambda: slice_features(self._module, rows) if self.featurewise else self._module,
        )

    @property
    def module(self) -> SAE[Any]:
        """The SAELens object itself, for analyses; it must not be modified."""
        return self._module

    def process_in(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The SAE's own input processing: cast, normalisation, subtraction of ``b_dec``."""
        processed: Tensor = self._module.process_sae_in(x)
        self._forget_normalisation_state()
        return processed

    def encode(
        self, x: Float[Tensor, "*batch d_in"], needed: Bool[Tensor, "*batch d_sae"] | None = None
    ) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations of the raw activations ``x``, by SAELens's own ``encode``.

        Where ``needed`` is false, zeros may stand in their place.
        """
        if needed is not None and (pieces := self._pieces(needed)) is not None:
            feature_acts = torch.zeros(needed.shape, dtype=self.dtype, device=x.device)
            for columns in pieces:
                feature_acts[..., columns] = view_features(self._module, columns).encode(x)
        else:
            feature_acts = self._module.encode(x)
            if self._columns is not None:
                feature_acts = feature_acts[..., self._columns]
        self._forget_normalisation_state()
        return feature_acts

    def encode_slice(
        self, x: Float[Tensor, "*batch d_in"], features: slice
    ) -> Float[Tensor, "*batch part"]:
        """Feature activations at some consecutive places, at less cost where ``featurewise``."""
        if not self.featurewise:
            return self.encode(x)[..., features]
        feature_acts: Tensor = view_features(self._module, features).encode(x)
        self._forget_normalisation_state()
        return feature_acts

    def _pieces(self, needed: Tensor) -> tuple[Tensor, ...] | None:
        if self.featurewise:
            return columns_to_read(needed, self._module.W_enc)
        return None if needed.any() else ()

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Tensor, Tensor]:
        """Feature activations of ``x`` and what SAELens's own ``decode`` makes of them."""
        feature_acts: Tensor = self._module.encode(x)
        reconstruction: Tensor = self._module.decode(feature_acts)
        self._forget_normalisation_state()
        return feature_acts, reconstruction

    def decode_update(
        self,
        update: Float[Tensor, "*batch d_sae"],
        x: Float[Tensor, "*batch d_in"],
        selects: bool = False,
    ) -> Float[Tensor, "*batch d_in"]:
        """``decode(f + update) - decode(f)`` at the token whose raw activations are ``x``.

        With ``selects`` only the rows of what changes may be read; see ``_sparse.can_select``.
        """
        product = sparse_product if selects else torch.matmul
        update, scale = update.to(self.dtype), self.token_scale(x)
        return functional.decode_update(update, self._W_dec, self.feature_scale, scale, product)

    def token_scale(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch 1"] | float | None:
        """Factor of what is decoded at the token whose raw activations are ``x``; None for 1."""
        if self._token_factor is not None:
            return self._token_factor
        return functional.normalisation_scale(x.to(self.dtype), self._normalisation)

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
            lambda: rebuild(self._module, device, dtype),
        )

    def save(self, directory: str | Path) -> None:
        """Write the SAE in SAELens's format (``cfg.json`` and ``sae_weights.safetensors``).

        Raises:
            ValueError: for an SAE restricted to some features, which is not the whole.
        """
        if self.features is not None:
            raise ValueError(f"Only a whole SAE can be saved; this one has {self.n_features}.")
        save_module(self._module, directory)

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
    return _share(info, device, dtype, (), None, lambda: rebuild(sae, device, dtype, copy=copy))


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
    return _share(info, device, dtype, rounding, features, lambda: assemble(cfg_dict, state))


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
