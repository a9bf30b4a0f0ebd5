"""``FSRLConfig``: what a user says about an FSRL adapter, as flat fields that are plain JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import PeftType

from ._fields import (
    BESIDE,
    LIVE_SAE,
    adapter_folder,
    beside_folder,
    is_beside,
    is_integer,
    is_layer_mapping,
    plain,
    plain_features,
    plain_integers,
    require_bool,
    require_number,
    require_one_of,
    require_one_sae_per_layer,
    require_schedule,
)
from .folder import forget_sums

_ACTIVATIONS = ("soft_threshold", "relu", "jumprelu")
_REDUCTIONS = ("sequence", "token")


@dataclass
class FSRLConfig(PeftConfig):
    """Configuration of a feature-steering adapter (FSRL, arXiv 2509.12934).

    Args:
        layer: Index of the decoder layer whose output is steered, or a list of them. Defaults to
            the layer named by the SAE's own ``hook_name``, or by the keys of ``sae``.
        sae: The frozen sparse autoencoder: ``"release/sae_id"`` (SAELens's registry, or a Hub
            repository in SAELens's format), a folder that SAELens wrote, a ``(release, sae_id)``
            pair, a mapping with those keys, or a live ``sae_lens.SAE``; for several layers, a
            mapping from layer to any of these. Saved as a reference; a live SAE is written next to
            the adapter.
        target_modules: Modules to steer instead of ``layer``, in PEFT's way (names, suffixes or a
            regular expression): for models whose decoder layers cannot be found, or for an SAE
            that was trained on another hook point.
        exclude_modules: Modules not to steer, in PEFT's way.
        layers_to_transform: Indices of the layers in which ``target_modules`` are steered.
        layers_pattern: Name of the list of layers that ``layers_to_transform`` counts.
        features: Indices of the only features that may be steered; the adapter has no rows for the
            others. For several layers, a mapping from layer to a list.
        exclude_features: Indices of features that are never steered, in the same form.
        rank: Rank of the adapter's weight as a product of two; None for a full one.
        activation: ``"soft_threshold"`` (two-sided: promotes and suppresses), ``"relu"`` (promotes
            only) or ``"jumprelu"`` (promotes only, learned jump).
        non_negative: Keep ``f + v`` non-negative: a feature can be lowered to zero, not below. Off,
            ``x' = x + decode(v)``, linear in ``v``, and the SAE's encoder is not needed.
        init_scale: Half-width of the uniform start of the adapter's weight, in units of the
            pre-activation per unit of SAE input. Not zero: the soft threshold has no slope at zero.
            Defaults to 1e-9, and for ``jumprelu`` to the first threshold over ``sqrt(d_in)``: a
            gate that never opens passes no gradient to the weight behind it.
        init_threshold: Start of every threshold, in units of the pre-activation. Defaults to 0 for
            ``soft_threshold`` and to ``jumprelu_bandwidth`` for ``jumprelu``.
        jumprelu_bandwidth: Width of the rectangle kernel of the straight-through gradient, in
            units of the pre-activation.
        l1_coeff: Weight of the mean over tokens of ``||v||_1`` in the training loss.
        l0_coeff: Weight of the mean over tokens of the number of steered features;
            ``jumprelu`` only.
        penalty_reduction: ``"sequence"`` (mean over the real tokens of each sequence, then over
            sequences: independent of batching and accumulation) or ``"token"`` (mean over all real
            tokens of a batch).
        penalty_warmup_ratio: Share of the training steps over which the penalty grows from nothing
            to its full weight.
        target_l0: Target number of steered features per token. During training the weight of
            the penalty then moves, from the given coefficient on, until this many are steered.
        threshold_lr_multiplier: Learning rate of the thresholds as a multiple of the trainer's.
        sae_dtype: Dtype in which the SAE computes, for example ``"bfloat16"``. Defaults to the
            dtype in which it is stored.
        modules_to_save: Further modules to train and save whole, in PEFT's way.
        sae_info: Filled in when the SAE is loaded: sizes, hook name, architecture, dtype and
            SHA-256 fingerprint. A different SAE is refused when the adapter is loaded again.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: a value out of range, or options that contradict each other.

    Example:
        >>> from peft_fsrl import FSRLConfig
        >>> config = FSRLConfig(layer=12, sae="gemma-scope-2b-pt-res-canonical/layer_12/width_65k")
        >>> config.activation
        'soft_threshold'
    """

    layer: int | list[int] | None = field(
        default=None, metadata={"help": "Index of the decoder layer whose output is steered."}
    )
    sae: Any = field(
        default=None,
        metadata={"help": "The frozen SAE: 'release/sae_id', a folder, or a live sae_lens.SAE."},
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to steer instead of `layer`."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to steer."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layers in which `target_modules` are steered."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that `layers_to_transform` counts."}
    )
    features: Any = field(
        default=None, metadata={"help": "The only features that may be steered, by index."}
    )
    exclude_features: Any = field(
        default=None, metadata={"help": "Features that are never steered, by index."}
    )
    rank: int | None = field(
        default=None, metadata={"help": "Rank of the adapter's weight; full if not given."}
    )
    activation: str = field(
        default="soft_threshold",
        metadata={"help": f"Activation of the steering vector, one of {_ACTIVATIONS}."},
    )
    non_negative: bool = field(default=True, metadata={"help": "Keep f + v non-negative."})
    init_scale: float | None = field(
        default=None, metadata={"help": "Half-width of the uniform start of the weight."}
    )
    init_threshold: float | None = field(
        default=None, metadata={"help": "Start of every threshold."}
    )
    jumprelu_bandwidth: float = field(
        default=1e-2, metadata={"help": "Kernel width of the straight-through gradient."}
    )
    l1_coeff: float = field(
        default=0.1, metadata={"help": "Weight of the mean L1 norm of the steering vector."}
    )
    l0_coeff: float = field(
        default=0.0, metadata={"help": "Weight of the mean count of steered features (jumprelu)."}
    )
    penalty_reduction: str = field(
        default="sequence", metadata={"help": "'sequence' or 'token': how the penalty is averaged."}
    )
    penalty_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps over which the penalty grows."}
    )
    target_l0: float | None = field(
        default=None, metadata={"help": "Steered features per token that the penalty aims at."}
    )
    threshold_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the thresholds over the trainer's."}
    )
    sae_dtype: str | None = field(
        default=None, metadata={"help": "Dtype in which the SAE computes."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole."}
    )
    sae_info: dict[str, Any] | None = field(
        default=None, metadata={"help": "Identity of the SAE, filled in when it is loaded."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = cast(PeftType, PeftType["FSRL"])
        # Not a field: `asdict` would deep-copy a live SAE and JSON could not hold it.
        self._live_saes: dict[str, Any] = {}
        self._folder: str | None = None
        self.target_modules = plain(self.target_modules)
        self.exclude_modules = plain(self.exclude_modules)
        self.layer, self.rank = plain_integers(self.layer), plain_integers(self.rank)
        self.features = plain_features(self.features)
        self.exclude_features = plain_features(self.exclude_features)
        if is_layer_mapping(self.sae):
            self.sae = {str(k): self._normalise_sae(v, str(k)) for k, v in self.sae.items()}
            if self.layer is None:
                self.layer = sorted(int(key) for key in self.sae)
        else:
            self.sae = self._normalise_sae(self.sae, "")
        self._validate()

    @property
    def layers(self) -> list[int]:
        """The layers that ``layer`` names, as a list."""
        if self.layer is None:
            return []
        return list(self.layer) if isinstance(self.layer, list) else [self.layer]

    def resolve_saes(self) -> dict[str, Any]:
        """What to load, by layer: a live SAE, or a reference whose path can be opened from here.

        Returns:
            By the layer as a string, or under ``""`` where one SAE serves every target.

        Raises:
            ValueError: if the config names no SAE, or one that was saved next to an adapter whose
                folder this config was not read from.
        """
        if self.sae is None:
            raise ValueError(
                "FSRLConfig needs `sae`: 'release/sae_id', a folder that SAELens wrote, or a live "
                "sae_lens.SAE."
            )
        references = self.sae if is_layer_mapping(self.sae) else {"": self.sae}
        return {key: self._resolve_sae(key, reference) for key, reference in references.items()}

    def select_features(self, key: str, d_sae: int) -> list[int] | None:
        """The features of one layer's SAE that may be steered, ascending; None for all.

        Args:
            key: the layer as a string, or ``""``.
            d_sae: how many features the SAE has.
        """
        only, never = (
            value.get(key) if isinstance(value, dict) else value
            for value in (self.features, self.exclude_features)
        )
        if only is not None:
            return sorted(only)
        if never is None:
            return None
        excluded = set(never)
        outside = [index for index in excluded if index >= d_sae]
        if outside:
            raise IndexError(
                f"`exclude_features` names feature {outside[0]}, but the SAE has features 0 to "
                f"{d_sae - 1}."
            )
        return [index for index in range(d_sae) if index not in excluded]

    def bind_sae(self, frozen: Any, info: dict[str, Any], key: str = "") -> None:
        """Keep a loaded SAE's identity, and the SAE itself where it has no other address."""
        self.sae_info = {**(self.sae_info or {}), key: info} if key else info
        reference = self.sae[key] if key else self.sae
        if reference == LIVE_SAE or is_beside(reference):
            self._live_saes[key] = frozen

    def _resolve_sae(self, key: str, reference: Any) -> Any:
        if key in self._live_saes:
            return self._live_saes[key]
        if reference == LIVE_SAE:
            raise ValueError(
                "This config was made from a live SAE that is no longer there. Pass the SAE again, "
                "or save the adapter first, which writes the SAE next to it."
            )
        if not is_beside(reference):
            return reference
        if self._folder is None:
            raise ValueError(
                f"This adapter's SAE was saved beside it, in '{reference[BESIDE]}/', but the "
                "config does not know which folder it was read from. Read it with "
                "PeftConfig.from_pretrained(...) or PeftModel.from_pretrained(...), or set `sae`."
            )
        return {"path": os.path.join(self._folder, reference[BESIDE])}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and the SAE in ``sae/`` where it has no other address."""
        # Of the files that these replace; a save of the whole adapter writes new ones.
        forget_sums(save_directory)
        in_memory = self.sae
        saved: dict[str, Any] = {}
        for key, live in self._live_saes.items():
            # A live SAE that no model has taken yet is SAELens's own object.
            write = live.save if hasattr(live, "save") else live.save_model
            saved[key] = {BESIDE: beside_folder(key)}
            write(os.path.join(save_directory, saved[key][BESIDE]))
        try:
            if saved:
                self.sae = saved.get("") or {**in_memory, **saved}
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.sae = in_memory

    def locate(self, name_or_path: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> None:
        """Learn where this config was read from, and fetch the SAEs that were saved beside it.

        Called at the end of ``PeftConfig.from_pretrained``; see ``_saving``.
        """
        references = self.sae.values() if is_layer_mapping(self.sae) else [self.sae]
        beside = [reference[BESIDE] for reference in references if is_beside(reference)]
        if beside:
            self._folder = adapter_folder(name_or_path, subfolder, beside, kwargs)

    def _normalise_sae(self, sae: Any, key: str) -> Any:
        if sae is None:
            return None
        if isinstance(sae, (str, Path)):
            # Absolute, so that the saved config can be read from another working directory.
            folder = Path(sae).expanduser()
            return str(folder.resolve()) if str(sae) and folder.is_dir() else str(sae)
        if isinstance(sae, (tuple, list)):
            if len(sae) != 2 or not all(isinstance(part, str) for part in sae):
                raise TypeError(
                    f"`sae` as a pair must be (release, sae_id), two strings; got {sae!r}."
                )
            return {"release": sae[0], "sae_id": sae[1]}
        if isinstance(sae, Mapping):
            return {str(key): str(value) for key, value in sae.items()}
        if hasattr(sae, "encode") and hasattr(sae, "W_dec"):
            self._live_saes[key] = sae
            return LIVE_SAE
        raise TypeError(
            "`sae` must be 'release/sae_id', a folder, a (release, sae_id) pair, a mapping or a "
            f"live sae_lens.SAE; got {type(sae).__name__}."
        )

    def _validate(self) -> None:
        if not all(is_integer(layer) for layer in self.layers):
            raise TypeError(
                f"`layer` must be an integer or a list of integers, got {self.layer!r}."
            )
        if any(layer < 0 for layer in self.layers):
            raise ValueError(f"`layer` must be 0 or more, got {self.layer}.")
        require_one_sae_per_layer(self)
        if self.rank is not None and (not is_integer(self.rank) or self.rank < 1):
            raise ValueError(f"`rank` must be an integer of 1 or more, got {self.rank!r}.")
        if self.features is not None and self.exclude_features is not None:
            raise ValueError("Give `features` or `exclude_features`, not both.")
        if self.layer is not None and self.target_modules is not None:
            raise ValueError(
                "`layer` and `target_modules` both say what to steer; give one of them "
                f"(got layer={self.layer}, target_modules={self.target_modules})."
            )
        require_one_of("activation", self.activation, _ACTIVATIONS)
        require_one_of("penalty_reduction", self.penalty_reduction, _REDUCTIONS)
        require_bool("non_negative", self.non_negative)
        for name in ("jumprelu_bandwidth", "threshold_lr_multiplier"):
            require_number(name, getattr(self, name), positive=True)
        if self.init_scale is not None:
            require_number("init_scale", self.init_scale, positive=True)
        for name in ("l1_coeff", "l0_coeff", "penalty_warmup_ratio"):
            require_number(name, getattr(self, name), positive=False)
        require_schedule(self)
        if self.init_threshold is not None:
            require_number(
                "init_threshold", self.init_threshold, positive=self.activation == "jumprelu"
            )
        if self.l0_coeff and self.activation != "jumprelu":
            raise ValueError(
                f"`l0_coeff` needs activation='jumprelu', whose gate has a gradient; got "
                f"{self.activation!r}. Use `l1_coeff`."
            )
