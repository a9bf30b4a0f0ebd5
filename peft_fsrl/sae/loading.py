"""Where SAEs come from: references, folders that SAELens wrote, SAELens's registry, the Hub.

Whatever the source, the result is a ``FrozenSAE``. No source runs code: releases that exist only as
torch files go through torch's weights-only loader.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .frozen import FrozenSAE, SAEInfo, compute_fingerprint, share_sae

if TYPE_CHECKING:
    from sae_lens import SAE


def freeze_sae(sae: SAE[Any]) -> FrozenSAE:
    """Take a live SAELens SAE as it is now; its tensors are copied.

    Args:
        sae: an inference SAE that reads and writes the same activations.

    Raises:
        TypeError: for anything but a SAELens inference SAE (training SAEs, transcoders).
    """
    return _freeze(sae, copy=True)


def _freeze(sae: SAE[Any], *, copy: bool) -> FrozenSAE:
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
    _require_finite(sae)
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
    return share_sae(sae, info, copy=copy)


def _require_finite(sae: SAE[Any]) -> None:
    for name, tensor in sae.state_dict().items():
        # Of the extremes, not of each value, which would take as much memory again.
        if tensor.numel() and not all(end.isfinite() for end in tensor.detach().aminmax()):
            raise ValueError(
                f"Expected an SAE of finite tensors, found nan or inf in {name}: whatever it "
                "steers would be nan. Load it again from its source."
            )


def load_sae(reference: str | Mapping[str, str]) -> FrozenSAE:
    """Load a frozen SAE from a folder, SAELens's registry or a Hub repository in SAELens's format.

    Args:
        reference: a local folder, ``"release/sae_id"``, or a mapping with ``path`` or with
            ``release`` and ``sae_id``.

    Raises:
        FileNotFoundError: a folder without ``cfg.json``.
        ValueError: an unknown release or id; the message lists the closest known ones.
    """
    parsed = parse_reference(reference)
    if "path" in parsed:
        return _freeze(_load_folder(Path(parsed["path"])), copy=False)
    return _freeze(_load_released(parsed["release"], parsed["sae_id"]), copy=False)


def take_sae(source: Any) -> FrozenSAE:
    """A frozen SAE from anything that names or is one: a reference, a live SAE, a frozen one."""
    if isinstance(source, FrozenSAE):
        return source
    return load_sae(source) if isinstance(source, (str, Mapping)) else freeze_sae(source)


def parse_reference(reference: str | Mapping[str, str]) -> dict[str, str]:
    """Turn a reference into ``{"path": ...}`` or ``{"release": ..., "sae_id": ...}``.

    Needs no network. A string that names an existing folder is a path; otherwise its longest prefix
    that is a registered release, or else its first two parts as a Hub repository, is the release.

    Raises:
        ValueError: neither a folder nor of the form ``release/sae_id``.
    """
    if isinstance(reference, Mapping):
        if set(reference) == {"path"} or set(reference) == {"release", "sae_id"}:
            return {key: str(value) for key, value in reference.items()}
        raise ValueError(
            "An SAE reference must have the key 'path', or 'release' and 'sae_id'; got "
            f"{sorted(reference)}."
        )
    if reference and Path(reference).expanduser().is_dir():
        return {"path": str(Path(reference).expanduser().resolve())}
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    parts = reference.split("/")
    releases = get_pretrained_saes_directory()
    for length in range(len(parts) - 1, 0, -1):
        if "/".join(parts[:length]) in releases:
            return {"release": "/".join(parts[:length]), "sae_id": "/".join(parts[length:])}
    if len(parts) > 2 and not reference.startswith((".", "/", "~")):
        return {"release": "/".join(parts[:2]), "sae_id": "/".join(parts[2:])}
    raise ValueError(
        f"Cannot find the SAE {reference!r}: it is neither a folder that exists nor "
        f"'release/sae_id' with a release that SAELens knows. {_closest(parts[0], releases)}"
    )


class HookPoint(NamedTuple):
    """A place in a transformer: the output of a layer, of its attention or of its MLP.

    Attributes:
        layer: index of the decoder layer.
        place: ``"resid_post"``, ``"attn_out"``, ``"mlp_out"``, or ``"z"``: what the attention's
            output projection reads, all heads side by side.
    """

    layer: int
    place: str


def parse_hook(hook_name: str | None) -> HookPoint | None:
    """The place that a hook name means; None for any that cannot be steered.

    ``blocks.12.hook_resid_post`` and ``blocks.13.hook_resid_pre`` are both the output of layer 12.
    """
    match = re.fullmatch(
        r"blocks\.(\d+)\.(?:attn\.)?hook_(resid_post|resid_pre|attn_out|mlp_out|z)",
        hook_name or "",
    )
    if match is None:
        match = re.fullmatch(r"(?:[\w.]*\.)?(?:layers|h)\.(\d+)", hook_name or "")
        return None if match is None else HookPoint(int(match[1]), "resid_post")
    layer, place = int(match[1]), match[2]
    if place == "resid_pre":
        return HookPoint(layer - 1, "resid_post") if layer > 0 else None
    return HookPoint(layer, place)


def parse_hook_layer(hook_name: str | None) -> int | None:
    """Index of the decoder layer whose *output* a hook name means; None for any other place."""
    hook = parse_hook(hook_name)
    return hook.layer if hook is not None and hook.place == "resid_post" else None


def _load_folder(path: Path) -> SAE[Any]:
    if not (path / "cfg.json").is_file():
        raise FileNotFoundError(
            "Expected an SAE in SAELens's format (cfg.json and sae_weights.safetensors) in "
            f"{path}, found no cfg.json. Save one with `sae.save_model(path)`, or name a release."
        )
    from sae_lens import SAE

    return SAE.load_from_disk(path)


def _load_released(release: str, sae_id: str) -> SAE[Any]:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    if release not in releases and "/" not in release:
        raise ValueError(f"Unknown SAE release {release!r}. {_closest(release, releases)}")
    if release in releases and sae_id not in releases[release].saes_map:
        known = releases[release].saes_map
        raise ValueError(
            f"Unknown sae_id {sae_id!r} in release {release!r}, which has {len(known)} SAEs. "
            f"{_closest(sae_id, known)}"
        )
    return SAE.from_pretrained(release, sae_id)


def _closest(name: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"Closest known: {matches}." if matches else f"Known, for example: {sorted(known)[:3]}."


def _optional_str(value: Any) -> str | None:
    return None if value is None else str(value)
