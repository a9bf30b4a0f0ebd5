"""``FSRLConfig``: what a user says about an FSRL adapter, as flat fields that are plain JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import PeftType

# Names under which a config stores an SAE that has no address of its own. The first stands for a
# live object that has not been saved yet, the second for the copy next to the adapter's weights.
LIVE_SAE = "<live>"
SAVED_SAE_FOLDER = "sae"

_ACTIVATIONS = ("soft_threshold", "relu", "jump_relu")
_REDUCTIONS = ("sequence", "token")


@dataclass
class FSRLConfig(PeftConfig):
    """Configuration of a feature-steering adapter (FSRL, arXiv 2509.12934).

    Args:
        layer: Index of the decoder layer whose output is steered. Defaults to the layer named by
            the SAE's own ``hook_name``.
        sae: The frozen sparse autoencoder: ``"release/sae_id"`` (SAELens's registry, or a Hub
            repository in SAELens's format), a folder that SAELens wrote, a ``(release, sae_id)``
            pair, a mapping with those keys, or a live ``sae_lens.SAE``. Saved as a reference; a
            live SAE is written next to the adapter.
        target_modules: Modules to steer instead of ``layer``, in PEFT's way (names, suffixes or a
            regular expression): for models whose decoder layers cannot be found, or for an SAE
            that was trained on another hook point.
        exclude_modules: Modules not to steer, in PEFT's way.
        activation: ``"soft_threshold"`` (two-sided: promotes and suppresses), ``"relu"`` (promotes
            only) or ``"jump_relu"`` (promotes only, learned jump).
        init_scale: Half-width of the uniform start of the adapter's weight, in units of the
            pre-activation per unit of SAE input. Not zero: the soft threshold has no slope at zero.
        init_threshold: Start of every threshold, in units of the pre-activation. Defaults to 0 for
            ``soft_threshold`` and to ``bandwidth`` for ``jump_relu``.
        bandwidth: Width of the rectangle kernel of ``jump_relu``'s straight-through gradient, in
            units of the pre-activation.
        l1_coeff: Weight of the mean over tokens of ``||v||_1`` in the training loss.
        l0_coeff: Weight of the mean over tokens of the number of steered features;
            ``jump_relu`` only.
        penalty_reduction: ``"sequence"`` (mean over the real tokens of each sequence, then over
            sequences: independent of batching and accumulation) or ``"token"`` (mean over all real
            tokens of a batch).
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

    layer: int | None = field(
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
    activation: str = field(
        default="soft_threshold",
        metadata={"help": f"Activation of the steering vector, one of {_ACTIVATIONS}."},
    )
    init_scale: float = field(
        default=1e-9, metadata={"help": "Half-width of the uniform start of the weight."}
    )
    init_threshold: float | None = field(
        default=None, metadata={"help": "Start of every threshold."}
    )
    bandwidth: float = field(
        default=1e-2, metadata={"help": "Kernel width of the straight-through gradient."}
    )
    l1_coeff: float = field(
        default=0.1, metadata={"help": "Weight of the mean L1 norm of the steering vector."}
    )
    l0_coeff: float = field(
        default=0.0, metadata={"help": "Weight of the mean count of steered features (jump_relu)."}
    )
    penalty_reduction: str = field(
        default="sequence", metadata={"help": "'sequence' or 'token': how the penalty is averaged."}
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
        self._live_sae: Any = None
        self._folder: str | None = None
        self.target_modules = _plain(self.target_modules)
        self.exclude_modules = _plain(self.exclude_modules)
        self.sae = self._normalise_sae(self.sae)
        self._validate()

    def resolve_sae(self) -> Any:
        """The live SAE, or a reference whose path, if it is one, can be opened from here.

        Raises:
            ValueError: if the config names no SAE, or one that was saved next to an adapter whose
                folder this config was not read from.
        """
        if self._live_sae is not None:
            return self._live_sae
        if self.sae is None:
            raise ValueError(
                "FSRLConfig needs `sae`: 'release/sae_id', a folder that SAELens wrote, or a live "
                "sae_lens.SAE."
            )
        if self.sae == LIVE_SAE:
            raise ValueError(
                "This config was made from a live SAE that is no longer there. Pass the SAE again, "
                "or save the adapter first, which writes the SAE next to it."
            )
        if self.sae == {"path": SAVED_SAE_FOLDER}:
            if self._folder is None:
                raise ValueError(
                    f"This adapter's SAE was saved beside it, in '{SAVED_SAE_FOLDER}/', but the "
                    "config does not know which folder it was read from. Read it with "
                    "FSRLConfig.from_pretrained(...) or PeftModel.from_pretrained(...), or pass "
                    "the SAE."
                )
            return {"path": os.path.join(self._folder, SAVED_SAE_FOLDER)}
        return self.sae

    def bind_sae(self, frozen: Any, info: dict[str, Any]) -> None:
        """Keep the loaded SAE's identity, and the SAE itself where it has no other address."""
        self.sae_info = info
        if self.sae == LIVE_SAE or self.sae == {"path": SAVED_SAE_FOLDER}:
            self._live_sae = frozen

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and the SAE in ``sae/`` where it has no other address."""
        if self._live_sae is None or not hasattr(self._live_sae, "save"):
            super().save_pretrained(save_directory, **kwargs)
            return
        self._live_sae.save(os.path.join(save_directory, SAVED_SAE_FOLDER))
        in_memory = self.sae
        self.sae = {"path": SAVED_SAE_FOLDER}
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.sae = in_memory

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> FSRLConfig:
        """Read a config from a folder or the Hub, and with it the SAE that was saved beside it."""
        config = cast(
            FSRLConfig,
            super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs),
        )
        if config.sae == {"path": SAVED_SAE_FOLDER}:
            config._folder = _adapter_folder(pretrained_model_name_or_path, subfolder, kwargs)
        return config

    def _normalise_sae(self, sae: Any) -> Any:
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
            self._live_sae = sae
            return LIVE_SAE
        raise TypeError(
            "`sae` must be 'release/sae_id', a folder, a (release, sae_id) pair, a mapping or a "
            f"live sae_lens.SAE; got {type(sae).__name__}."
        )

    def _validate(self) -> None:
        if self.layer is not None and not _is_integer(self.layer):
            raise TypeError(f"`layer` must be an integer, got {self.layer!r}.")
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"`layer` must be 0 or more, got {self.layer}.")
        if self.layer is not None and self.target_modules is not None:
            raise ValueError(
                "`layer` and `target_modules` both say what to steer; give one of them "
                f"(got layer={self.layer}, target_modules={self.target_modules})."
            )
        _require_one_of("activation", self.activation, _ACTIVATIONS)
        _require_one_of("penalty_reduction", self.penalty_reduction, _REDUCTIONS)
        for name in ("init_scale", "bandwidth", "threshold_lr_multiplier"):
            _require_number(name, getattr(self, name), positive=True)
        for name in ("l1_coeff", "l0_coeff"):
            _require_number(name, getattr(self, name), positive=False)
        if self.init_threshold is not None:
            _require_number(
                "init_threshold", self.init_threshold, positive=self.activation == "jump_relu"
            )
        if self.l0_coeff and self.activation != "jump_relu":
            raise ValueError(
                f"`l0_coeff` needs activation='jump_relu', whose gate has a gradient; got "
                f"{self.activation!r}. Use `l1_coeff`."
            )


def _plain(modules: Any) -> Any:
    """A set of module names as a list, which JSON can hold in one order."""
    return sorted(modules) if isinstance(modules, (set, frozenset)) else modules


def _require_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")


def _is_integer(value: Any) -> bool:
    # NumPy's integers are not `int`, but like it have `__index__`; floats and strings have not.
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _require_number(name: str, value: Any, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        wanted = "positive" if positive else "not negative"
        raise ValueError(f"`{name}` must be finite and {wanted}, got {value}.")


def _adapter_folder(name_or_path: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> str:
    local = os.path.join(name_or_path, subfolder) if subfolder else name_or_path
    if os.path.isdir(local):
        return os.path.abspath(local)
    from huggingface_hub import snapshot_download

    inside = f"{subfolder}/{SAVED_SAE_FOLDER}" if subfolder else SAVED_SAE_FOLDER
    allowed = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    root = snapshot_download(
        name_or_path,
        allow_patterns=[f"{inside}/*"],
        **{key: kwargs[key] for key in allowed if key in kwargs},
    )
    return os.path.join(root, subfolder) if subfolder else root
