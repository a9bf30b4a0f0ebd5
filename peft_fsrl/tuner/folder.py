"""What a saved adapter must hold: its own tensors, and the SAEs that have no other address.

PEFT writes and reads the files. This module checks them: which names, shapes and dtypes the weights
may have, whose features they steer, and where an SAE beside them may lie.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..sae.loading import take_sae

# How a saved config names an SAE that lies in a folder next to the weights.
BESIDE = "beside_adapter"
_BESIDE_FOLDER = re.compile(r"sae(_layer_\d+)?")
# An adapter's tensors, beside its identity; of one value per feature where nothing else is said.
_OWN_NAMES = ("weight", "bias", "down", "threshold", "log_threshold", "gain")
_OWN_KEY = re.compile(rf"(?:.*\.)?fsrl_adapter\.({'|'.join(_OWN_NAMES)}|identity)")
_FLOATING = ("F64", "F32", "F16", "BF16")


class LiveSAE(str):
    """A text that stands for an SAE without an address, and brings it along.

    A config's fields must survive ``asdict``, ``replace`` and JSON, which an SAE does not.

    Attributes:
        source: a live SAE, or ``{"path": ...}``.
    """

    TEXT = "<live>"
    source: Any

    @classmethod
    def holding(cls, source: Any) -> LiveSAE:
        """Bring ``source`` along."""
        made = cls(cls.TEXT)
        made.source = source
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveSAE:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # SAELens's own objects do not pickle.
        named = isinstance(self.source, Mapping)
        return LiveSAE.holding, (self.source if named else take_sae(self.source),)


def is_beside(reference: Any) -> bool:
    """Whether a reference means the copy of an SAE next to the adapter."""
    return isinstance(reference, Mapping) and set(reference) == {BESIDE}


def beside_folder(layer: str) -> str:
    """Folder, inside the adapter's, for the SAE of a layer, or of all targets under ``""``.

    Never nested: ``push_to_hub`` uploads folders one level deep.
    """
    return f"sae_layer_{layer}" if layer else "sae"


def find_folder(
    name_or_path: str, subfolder: str | None, beside: Sequence[str], kwargs: Mapping[str, Any]
) -> str:
    """The local folder of an adapter, fetched from the Hub with what lies beside its config.

    Args:
        name_or_path: a folder, or a repository on the Hub.
        subfolder: of the adapter inside it.
        beside: folders of SAEs inside the adapter's.
        kwargs: of ``from_pretrained``, of which those for the Hub count.
    """
    local = os.path.join(name_or_path, subfolder) if subfolder else name_or_path
    if os.path.isdir(local):
        return os.path.abspath(local)
    from huggingface_hub import snapshot_download

    inside = f"{subfolder}/" if subfolder else ""
    wanted = [SAFETENSORS_WEIGHTS_NAME, *(f"{_require_beside(name)}/*" for name in beside)]
    allowed = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    root = snapshot_download(
        name_or_path,
        allow_patterns=[inside + name for name in wanted],
        **{key: kwargs[key] for key in allowed if key in kwargs},
    )
    return os.path.join(root, subfolder) if subfolder else root


def sae_inside(folder: str, name: str) -> str:
    """The path of an SAE beside an adapter, which must lie in the adapter's folder.

    Raises:
        ValueError: for a name that leads elsewhere.
    """
    path = os.path.join(folder, _require_beside(name))
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        raise ValueError(
            f"Expected the adapter's SAE in {path}, found a link to {os.path.realpath(path)}. An "
            "SAE beside an adapter is read from the adapter's own folder only: copy it there."
        )
    return path


def _require_beside(name: str) -> str:
    if not _BESIDE_FOLDER.fullmatch(str(name)):
        raise ValueError(
            "Expected the adapter's SAE in a folder named 'sae' or 'sae_layer_N' beside it, "
            f"found {name!r} in adapter_config.json. The config is damaged, or crafted to read "
            "other files: do not use it."
        )
    return name


def check_header(
    folder: str, shapes: Iterable[tuple[int, int]], rank: int | None, trained: Iterable[str]
) -> None:
    """Compare names, shapes and dtypes of the weights in a folder with what its config promises.

    Without a file of safetensors there is nothing to compare.

    Args:
        folder: of the adapter.
        shapes: number of features and width of each layer's SAE.
        rank: of the adapter's weight.
        trained: names of further modules that were saved whole.

    Raises:
        ValueError: for a tensor that is not the adapter's, or not as promised.
    """
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"Expected weights in {path}, found a file that cannot be read ({error}). It is "
            "damaged or incomplete: copy it again."
        ) from None
    promised: dict[str, set[tuple[int, ...]]] = {}
    for n_features, d_in in shapes:
        allowed = {"weight": (n_features, rank or d_in), "down": (rank or 0, d_in)}
        for name in _OWN_NAMES:
            promised.setdefault(name, set()).add(allowed.get(name, (n_features,)))
    for key, (shape, dtype) in found.items():
        own = _OWN_KEY.fullmatch(key)
        if own is None:
            if any(f".{name}." in f".{key}" for name in trained):
                continue
            raise ValueError(_foreign([key], path))
        if own[1] == "identity":
            continue
        if dtype not in _FLOATING or (promised and shape not in promised[own[1]]):
            expected = f" of shape {sorted(promised[own[1]])}" if promised else ""
            raise ValueError(
                f"Expected {key} in {path} as floating-point numbers{expected}, found {dtype} of "
                f"shape {shape}. The weights belong to another adapter_config.json: copy both."
            )


def check_state(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor], says: str
) -> None:
    """Compare tensors that are about to be loaded with those of an adapter in a model.

    Args:
        model: with the adapter.
        adapter_name: its name.
        state: tensors under the names that they have in the model.
        says: what the adapter is, for messages.

    Raises:
        ValueError: for a tensor that is not the adapter's or not of its shape, one that is missing,
            or an adapter of other features.

    Warns:
        UserWarning: for nan or inf.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    marks = (f".fsrl_adapter.{adapter_name}.", f".modules_to_save.{adapter_name}.")
    own = {key: tensor for key, tensor in tensors.items() if any(m in f".{key}" for m in marks)}
    if foreign := sorted(set(state) - set(own)):
        raise ValueError(_foreign(foreign, "the weights"))
    if missing := sorted(key for key in set(own) - set(state) if marks[0] in f".{key}"):
        raise ValueError(
            f"The weights do not belong to this adapter ({says}) or to this model: expected "
            f"{missing}, found none. Load the weights with the config and the base model that they "
            "were trained with."
        )
    for key, tensor in state.items():
        if key.endswith(".identity"):
            if not torch.equal(tensor.cpu(), own[key].cpu()):
                raise ValueError(
                    f"The weights steer other features than adapter '{adapter_name}' ({says}) at "
                    f"{key.rpartition('.fsrl_adapter')[0]}: they were trained with another SAE, "
                    "other `features`, another `activation` or another `non_negative`. Load them "
                    "under a new adapter name, with their own config."
                )
        elif not tensor.is_floating_point():
            raise ValueError(f"Expected floating-point numbers in {key}, found {tensor.dtype}.")
        elif tensor.numel() and not all(end.isfinite() for end in tensor.detach().aminmax()):
            warnings.warn(
                f"The weights contain nan or inf, in {key}: the adapter's output will too. "
                "Training diverged before they were saved: load an earlier checkpoint.",
                stacklevel=2,
            )


def compute_identity(*facts: Any) -> Tensor:
    """SHA-256 of what decides which features an adapter's rows steer: shape ``(32,)``, uint8."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


def _foreign(keys: Sequence[str], where: str) -> str:
    return (
        f"Expected only tensors of the adapter (and of `modules_to_save`) in {where}, found "
        f"{keys[:3]}. Loaded, they would replace weights of the base model for good. If they were "
        "trained on purpose, name their modules in `modules_to_save`; if they are embeddings that "
        "PEFT saved along, save with `save_embedding_layers=False`."
    )
