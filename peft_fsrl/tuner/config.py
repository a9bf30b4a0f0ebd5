"""``FSRLConfig``: the settings of an FSRL adapter, as flat fields that are plain JSON."""

from __future__ import annotations

import copy
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import PeftType

from ..functional import ACTIVATIONS
from ..sae.loading import take_sae
from .folder import (
    BESIDE,
    LiveSAE,
    beside_folder,
    check_header,
    find_folder,
    is_beside,
    sae_inside,
)

# What decides which features an adapter's weights steer, and how.
_MEANING = (
    "layer",
    "sae",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "features",
    "exclude_features",
    "rank",
    "activation",
    "non_negative",
    "jumprelu_bandwidth",
    "sae_dtype",
    "sae_info",
)
_REDUCTIONS = ("sequence", "token")
_INIT_WEIGHTS = ("uniform", "encoder")
# Weights of the terms of the sparsity penalty.
COEFFICIENTS = ("l1_coeff", "l2_coeff", "l0_coeff")


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
            only), ``"jumprelu"`` (promotes only, learned jump) or ``"gain"``: one signed factor per
            feature is trained, ``v = gain * relu(u)``, and ``u`` is the SAE's own encoder, frozen,
            so that a feature is promoted or suppressed only where it is active. Needs an SAE whose
            features have an encoder of their own.
        non_negative: Keep ``f + v`` non-negative: a feature can be lowered to zero, not below. Off,
            ``x' = x + decode(v)``, linear in ``v``, and the SAE's encoder is not needed.
        init_weights: ``"uniform"`` (noise) or ``"encoder"``: the SAE's own encoder rows times
            ``init_scale``, with its biases and thresholds, so that a feature is steered where it is
            active. The latter needs ``"relu"`` or ``"jumprelu"`` as activation, a full rank, and an
            SAE whose features have an encoder of their own (standard, gated, jumprelu).
        init_scale: For ``"uniform"`` the half-width of the start of the adapter's weight, in units
            of the pre-activation per unit of SAE input. Not zero: the soft threshold has no slope
            at zero. Defaults to 1e-9, and for ``jumprelu`` to the first threshold over
            ``sqrt(d_in)``: a gate that never opens passes no gradient to the weight behind it. For
            ``"encoder"`` the share of its excess over its threshold by which an active feature is
            steered at the start; defaults to 0.02.
        init_threshold: Start of every threshold, in units of the pre-activation. Defaults to 0 for
            ``soft_threshold`` and to ``jumprelu_bandwidth`` for ``jumprelu``.
        min_gain: Least value of a gain, at most 0; None for no bound. With ``"gain"`` only. After
            each training step, gains below it are raised to it. At -1 an active feature of a
            standard SAE can be removed, at -0.5 it keeps half of its activation, at 0 none is
            suppressed.
        jumprelu_bandwidth: Width of the rectangle kernel of the straight-through gradient, in
            units of the pre-activation.
        l1_coeff: Weight of the mean over tokens of ``||v||_1`` in the training loss. Defaults to
            0.1, and with ``target_l0``, which needs no penalty, to 0.
        l2_coeff: Weight of the mean over tokens of ``||v||_2`` squared, which makes steering small
            and not sparse.
        l0_coeff: Weight of the mean over tokens of the number of steered features;
            ``jumprelu`` only.
        penalty_reduction: ``"sequence"`` (mean over the real tokens of each sequence, then over
            sequences: independent of batching and accumulation) or ``"token"`` (mean over all real
            tokens of a batch).
        penalty_warmup_ratio: Share of the training steps over which the penalty grows from nothing
            to its full weight.
        target_l0: Target number of steered features per token, at each layer. During training the
            thresholds (the bias of ``relu``) then move together, until this many are steered; not
            for ``gain``.
        threshold_lr_multiplier: Learning rate of the thresholds as a multiple of the trainer's.
        sae_dtype: Dtype in which the SAE computes, for example ``"bfloat16"``. Defaults to the
            dtype in which it is stored.
        compile: Compile the steering function. Defaults to what the environment variable
            ``PEFT_FSRL_COMPILE`` says (``0`` or ``1``), else to True on CUDA and False elsewhere.
        modules_to_save: Further modules to train and save whole, in PEFT's way.
        sae_info: Identity of each SAE by layer (``""`` where one serves every target): sizes, hook
            name, architecture, dtype and SHA-256 fingerprint. Written when an adapter is saved; a
            different SAE is refused when it is loaded again.

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
        metadata={"help": f"Activation of the steering vector, one of {ACTIVATIONS}."},
    )
    non_negative: bool = field(default=True, metadata={"help": "Keep f + v non-negative."})
    init_weights: str = field(
        default="uniform",
        metadata={"help": "Start of the weight: 'uniform' noise, or the SAE's own 'encoder'."},
    )
    init_scale: float | None = field(
        default=None,
        metadata={"help": "Half-width of the uniform start, or factor of the encoder's rows."},
    )
    init_threshold: float | None = field(
        default=None, metadata={"help": "Start of every threshold."}
    )
    min_gain: float | None = field(
        default=None, metadata={"help": "Least value of a gain, at most 0."}
    )
    jumprelu_bandwidth: float = field(
        default=1e-2, metadata={"help": "Kernel width of the straight-through gradient."}
    )
    l1_coeff: float | None = field(
        default=None,
        metadata={"help": "Weight of the mean L1 norm of v: 0.1, or with target_l0 0."},
    )
    l2_coeff: float = field(
        default=0.0, metadata={"help": "Weight of the mean squared L2 norm of the steering vector."}
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
        default=None, metadata={"help": "Steered features per token that the thresholds aim at."}
    )
    threshold_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the thresholds over the trainer's."}
    )
    sae_dtype: str | None = field(
        default=None, metadata={"help": "Dtype in which the SAE computes."}
    )
    compile: bool | None = field(
        default=None, metadata={"help": "Compile the steering function; by default on CUDA."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole."}
    )
    sae_info: dict[str, Any] | None = field(
        default=None, metadata={"help": "Identity of each SAE, filled in when it is loaded."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = cast(PeftType, PeftType["FSRL"])
        # What a model that is being made, or saved, has found out; see `FSRLModel`.
        self._used: FSRLConfig | None = None
        self._target_paths: frozenset[str] | None = None
        self._normalize()

    def copied(self) -> FSRLConfig:
        """A copy for one model, to which the model adds what it finds out.

        Whatever was set on this object after it was made is brought into plain form and checked.
        """
        other = copy.copy(self)
        other._used = None
        other._normalize()
        return other

    def as_used(self, used: FSRLConfig) -> FSRLConfig:
        """A copy with all that decides what an adapter's weights mean as a model uses it.

        This object is the user's, who may have changed it since.
        """
        other = copy.copy(self)
        for name in _MEANING:
            setattr(other, name, getattr(used, name))
        return other

    def _normalize(self) -> None:
        self.target_modules = _plain(self.target_modules)
        self.exclude_modules = _plain(self.exclude_modules)
        self.layer, self.rank = _plain_integers(self.layer), _plain_integers(self.rank)
        self.features = _plain_features(self.features)
        self.exclude_features = _plain_features(self.exclude_features)
        if is_layer_mapping(self.sae):
            self.sae = {str(key): _plain_reference(value) for key, value in self.sae.items()}
            if self.layer is None:
                self.layer = sorted(int(key) for key in self.sae)
        else:
            self.sae = _plain_reference(self.sae)
        if self.l1_coeff is None:
            self.l1_coeff = 0.1 if self.target_l0 is None else 0.0
        self._validate()

    @property
    def starts_from_encoder(self) -> bool:
        """Whether the weight starts as rows of the SAE's own encoder."""
        return self.init_weights == "encoder" or self.activation == "gain"

    @property
    def penalizes(self) -> bool:
        """Whether anything is added to the training loss."""
        return any(getattr(self, name) for name in COEFFICIENTS)

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
        references = self._references()
        for reference in references.values():
            if is_beside(reference):
                raise ValueError(
                    f"This adapter's SAE was saved beside it, in '{reference[BESIDE]}/', but the "
                    "config does not know which folder it was read from. Read it with "
                    "FSRLConfig.from_pretrained(folder) (PeftModel.from_pretrained does; to "
                    "transformers' load_adapter pass it as `peft_config`), or set `sae`."
                )
        return {key: _source_of(reference) for key, reference in references.items()}

    def _references(self) -> dict[str, Any]:
        return dict(self.sae) if is_layer_mapping(self.sae) else {"": self.sae}

    def _with_references(self, references: Mapping[str, Any]) -> Any:
        return dict(references) if is_layer_mapping(self.sae) else references[""]

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
        self.sae_info = {**(self.sae_info or {}), key: info}
        references = self._references()
        if isinstance(references[key], LiveSAE):
            references[key] = LiveSAE.holding(frozen)
            self.sae = self._with_references(references)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and the SAE in ``sae/`` where it has no other address."""
        used, self._used = self._used, None
        saved = self.copied() if used is None else self.as_used(used)
        references = saved._references()
        for key, reference in references.items():
            if isinstance(reference, LiveSAE):
                folder = beside_folder(key)
                take_sae(reference.source).save(os.path.join(save_directory, folder))
                references[key] = {BESIDE: folder}
        saved.sae = saved._with_references(references)
        super(FSRLConfig, saved).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Read a config, and compare the weights beside it with what it promises.

        Nothing is written and no weight is read: names, shapes and dtypes stand in the header of
        ``adapter_model.safetensors``. PEFT calls this before it makes an adapter.

        Raises:
            ValueError: for a file of weights with tensors that are not this adapter's, or of other
                shapes or dtypes, and for an SAE that is not inside the adapter's folder.
        """
        name = os.fspath(pretrained_model_name_or_path)
        config = super().from_pretrained(name, subfolder=subfolder, **kwargs)
        if isinstance(config, FSRLConfig):
            references = config._references()
            beside = {k: r[BESIDE] for k, r in references.items() if is_beside(r)}
            folder = find_folder(name, subfolder, sorted(beside.values()), kwargs)
            for key, inside in beside.items():
                references[key] = LiveSAE.holding({"path": sae_inside(folder, inside)})
            config.sae = config._with_references(references)
            config._check_weights(folder)
        return config

    def _check_weights(self, folder: str) -> None:
        shapes = []
        for key, info in (self.sae_info or {}).items():
            chosen = self.select_features(key, info["d_sae"])
            n_features = info["d_sae"] if chosen is None else len(chosen)
            shapes.append((n_features, info["d_in"]))
        check_header(folder, shapes, self.rank, self.modules_to_save or [])

    def _validate(self) -> None:
        if not all(_is_integer(layer) for layer in self.layers):
            raise TypeError(
                f"`layer` must be an integer or a list of integers, got {self.layer!r}."
            )
        if any(layer < 0 for layer in self.layers):
            raise ValueError(f"`layer` must be 0 or more, got {self.layer}.")
        _require_one_sae_per_layer(self)
        if self.rank is not None and (not _is_integer(self.rank) or self.rank < 1):
            raise ValueError(f"`rank` must be an integer of 1 or more, got {self.rank!r}.")
        if self.features is not None and self.exclude_features is not None:
            raise ValueError("Give `features` or `exclude_features`, not both.")
        if self.layer is not None and self.target_modules is not None:
            raise ValueError(
                "`layer` and `target_modules` both say what to steer; give one of them "
                f"(got layer={self.layer}, target_modules={self.target_modules})."
            )
        _require_one_of("activation", self.activation, ACTIVATIONS)
        _require_one_of("penalty_reduction", self.penalty_reduction, _REDUCTIONS)
        _require_start(self)
        _require_bool("non_negative", self.non_negative)
        if self.compile is not None:
            _require_bool("compile", self.compile)
        for name in ("jumprelu_bandwidth", "threshold_lr_multiplier"):
            _require_number(name, getattr(self, name), positive=True)
        if self.init_scale is not None:
            _require_number("init_scale", self.init_scale, positive=True)
        for name in (*COEFFICIENTS, "penalty_warmup_ratio"):
            _require_number(name, getattr(self, name), positive=False)
        _require_schedule(self)
        _require_min_gain(self)
        if self.init_threshold is not None:
            _require_number(
                "init_threshold", self.init_threshold, positive=self.activation == "jumprelu"
            )
        if self.l0_coeff and self.activation != "jumprelu":
            raise ValueError(
                f"`l0_coeff` needs activation='jumprelu', whose gate has a gradient; got "
                f"{self.activation!r}. Use `l1_coeff`."
            )


def _plain_reference(sae: Any) -> Any:
    """A reference to an SAE as plain JSON, or as text with a live SAE behind it."""
    if sae is None or isinstance(sae, LiveSAE):
        return sae
    if isinstance(sae, (str, Path)):
        # Absolute, so that the saved config can be read from another working directory.
        folder = Path(sae).expanduser()
        return str(folder.resolve()) if str(sae) and folder.is_dir() else str(sae)
    if isinstance(sae, (tuple, list)):
        if len(sae) != 2 or not all(isinstance(part, str) for part in sae):
            raise TypeError(f"`sae` as a pair must be (release, sae_id), two strings; got {sae!r}.")
        return {"release": sae[0], "sae_id": sae[1]}
    if isinstance(sae, Mapping):
        return {str(key): str(value) for key, value in sae.items()}
    if hasattr(sae, "encode") and hasattr(sae, "W_dec"):
        return LiveSAE.holding(sae)
    raise TypeError(
        "`sae` must be 'release/sae_id', a folder, a (release, sae_id) pair, a mapping or a "
        f"live sae_lens.SAE; got {type(sae).__name__}."
    )


def _source_of(reference: Any) -> Any:
    if isinstance(reference, LiveSAE):
        return reference.source
    if reference == LiveSAE.TEXT:
        raise ValueError(
            "This config was made from a live SAE that no longer exists. Pass the SAE again, "
            "or save the adapter first, which writes the SAE next to it."
        )
    return reference


def _plain(modules: Any) -> Any:
    """A set of module names as a list, which JSON can hold in one order."""
    return sorted(modules) if isinstance(modules, (set, frozenset)) else modules


def is_layer_mapping(sae: Any) -> bool:
    """Whether a mapping goes from layers to SAEs, and is not itself a reference to one."""
    return isinstance(sae, Mapping) and all(str(key).isdecimal() for key in sae) and bool(sae)


def _plain_features(features: Any) -> Any:
    """Feature indices as lists of integers, which JSON can hold; by layer where they are."""
    if features is None:
        return None
    if isinstance(features, Mapping):
        return {str(layer): _plain_features(chosen) for layer, chosen in features.items()}
    features = list(features)
    if any(isinstance(f, bool) or str(getattr(f, "dtype", "")).endswith("bool") for f in features):
        raise TypeError("Expected feature indices, got a mask of truth values: give its indices.")
    chosen = sorted({operator.index(feature) for feature in features})
    if not chosen or chosen[0] < 0:
        raise ValueError(f"Expected feature indices of 0 or more, at least one; got {chosen[:5]}.")
    return chosen


def _require_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")


def _require_one_sae_per_layer(config: Any) -> None:
    """One SAE for one layer, or a mapping with an SAE for each of several."""
    layers = config.layers
    if len(set(layers)) != len(layers) or config.layer == []:
        raise ValueError(f"`layer` must name each layer once, at least one; got {config.layer}.")
    given = set(config.sae) if is_layer_mapping(config.sae) else None
    for name in ("features", "exclude_features"):
        by_layer = getattr(config, name)
        if isinstance(by_layer, Mapping) and not set(by_layer) <= (given or set()):
            raise ValueError(
                f"`{name}` by layer goes with `sae` by layer: expected layers among "
                f"{sorted(given or [])}, got {sorted(by_layer)}. For one SAE, give a list."
            )
    if given is not None and given != {str(layer) for layer in layers}:
        raise ValueError(
            f"`sae` must have one SAE for each of the layers {layers}, found SAEs for "
            f"{sorted(given)}."
        )
    if given is None and len(layers) > 1:
        raise ValueError(
            f"Several layers need an SAE each: pass `sae` as a mapping from layer to SAE, got "
            f"one SAE for {layers}."
        )


def _require_start(config: Any) -> None:
    """Check that the encoder can start what is asked for."""
    _require_one_of("init_weights", config.init_weights, _INIT_WEIGHTS)
    if not config.starts_from_encoder:
        return
    if config.rank is not None:
        raise ValueError(
            "The SAE's encoder has rows of full rank and cannot start a weight of "
            f"rank={config.rank}. Leave `rank` out, or use init_weights='uniform' and an "
            "activation other than 'gain'."
        )
    if config.activation == "gain":
        for name in ("init_scale", "init_threshold"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"activation='gain' starts with gains of zero on the SAE's own encoder, and "
                    f"`{name}` would do nothing; got {getattr(config, name)}. Leave it out."
                )
    if config.activation == "soft_threshold":
        raise ValueError(
            "init_weights='encoder' needs activation='relu' or 'jumprelu', got 'soft_threshold'. "
            "It is negative wherever a feature is not active, which a two-sided activation would "
            "steer down at every token."
        )


def _require_min_gain(config: Any) -> None:
    """Check that there are gains to bound, and that they start within the bound."""
    value = config.min_gain
    if value is None:
        return
    if config.activation != "gain":
        raise ValueError(
            f"`min_gain` needs activation='gain', got {config.activation!r}. Leave it out."
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`min_gain` must be a number, got {value!r}.")
    if not -math.inf < value <= 0:
        raise ValueError(
            f"`min_gain` must be finite and at most 0, where gains start; got {value}."
        )


def _require_schedule(config: Any) -> None:
    """Check the fields that say how the penalty's weight moves during training."""
    if config.penalty_warmup_ratio > 1:
        raise ValueError(
            "`penalty_warmup_ratio` is a share of the training steps, at most 1; got "
            f"{config.penalty_warmup_ratio}."
        )
    if config.target_l0 is None:
        return
    _require_number("target_l0", config.target_l0, positive=True)
    if config.activation == "gain":
        raise ValueError(
            "`target_l0` moves thresholds, and activation='gain' has none: a feature is steered "
            "wherever the SAE finds it active. Allow fewer `features`, raise `l1_coeff`, or take "
            "another activation."
        )


def _plain_integers(value: Any) -> Any:
    """NumPy's integers as Python's, which JSON can hold; what is no integer is left alone."""
    if isinstance(value, (list, tuple)):
        return [_plain_integers(each) for each in value]
    return operator.index(value) if _is_integer(value) else value


def _is_integer(value: Any) -> bool:
    # NumPy's integers are not `int`, but like it have `__index__`; floats and strings have not.
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def _require_number(name: str, value: Any, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        wanted = "positive" if positive else "not negative"
        raise ValueError(f"`{name}` must be finite and {wanted}, got {value}.")
