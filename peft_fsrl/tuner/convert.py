"""Import checkpoints of the method's first research code as PEFT checkpoints.

That code wrote a folder with ``adapter_weights.safetensors`` and ``fsrl_adapter_config.json``. Its
optional ``steering_magnitude`` multiplies the steering vector; every activation is positively
homogeneous, so the factor is folded into the weights without changing an output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..sae.loading import parse_hook_layer, take_sae
from .config import FSRLConfig
from .folder import compute_identity
from .placement import decoder_layers

WEIGHTS = "adapter_weights.safetensors"
CONFIG = "fsrl_adapter_config.json"
_WEIGHT, _BIAS = "adapter_linear.weight", "adapter_linear.bias"
_KNOWN_KEYS = {_WEIGHT, _BIAS, "soft_threshold", "log_threshold", "steering_magnitude"}


def convert_research_checkpoint(
    source: str | Path,
    destination: str | Path,
    base_model: nn.Module,
    *,
    non_negative: bool,
    sae: Any = None,
    layer: int | None = None,
) -> FSRLConfig:
    """Write a PEFT checkpoint that steers as the research checkpoint did.

    Args:
        source: folder with ``adapter_weights.safetensors`` and ``fsrl_adapter_config.json``.
        destination: folder to write ``adapter_config.json`` and ``adapter_model.safetensors`` to;
            it must not hold an adapter.
        base_model: the model that was steered; only its name and those of its modules are used. The
            research code names models as TransformerLens does, which no loader of ours knows.
        non_negative: whether the code clamped ``f + v`` at zero. It does since November 2025 and
            did not before, and the file does not say which.
        sae: the SAE, where the config does not name one that can be found.
        layer: the steered layer, where neither the config nor the SAE's hook name says it.

    Returns:
        The config that was written.

    Raises:
        FileNotFoundError: if a file is missing.
        FileExistsError: if ``destination`` holds an adapter.
        ValueError: for unknown or missing tensors, shapes that contradict each other, or a config
            that names neither SAE nor layer where none is given.
    """
    source, destination = Path(source), Path(destination)
    for name in (WEIGHTS, CONFIG):
        if not (source / name).is_file():
            raise FileNotFoundError(f"Expected {WEIGHTS} and {CONFIG} in {source}, {name} missing.")
    if (destination / "adapter_config.json").exists():
        raise FileExistsError(f"{destination} already holds an adapter. Choose another folder.")
    tensors = load_file(source / WEIGHTS)
    said = json.loads((source / CONFIG).read_text())
    activation, parameters = _convert_tensors(tensors)
    reference = sae if sae is not None else _find_sae(said)
    frozen = take_sae(reference)
    _check_shape(parameters["weight"], (frozen.info.d_sae, frozen.info.d_in))
    if layer is None:
        layer = _find_layer(said, frozen.info.hook_name)
    config = FSRLConfig(
        layer=layer,
        sae=reference,
        activation=activation,
        non_negative=non_negative,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=getattr(base_model, "name_or_path", None) or None,
    )
    config.bind_sae(frozen, frozen.info.to_dict())
    identity = compute_identity(frozen.info.fingerprint, None, activation, non_negative)
    parameters["identity"] = identity
    path = decoder_layers(base_model)[layer]
    prefix = f"base_model.model.{path}.fsrl_adapter."
    destination.mkdir(parents=True, exist_ok=True)
    state = {prefix + name: tensor.contiguous() for name, tensor in parameters.items()}
    save_file(state, destination / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(destination))
    return config


def _convert_tensors(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    unknown = set(tensors) - _KNOWN_KEYS
    missing = {_WEIGHT, _BIAS} - set(tensors)
    if unknown or missing or {"soft_threshold", "log_threshold"} <= set(tensors):
        raise ValueError(
            f"Expected {_WEIGHT}, {_BIAS} and at most one of soft_threshold and log_threshold, "
            f"found {sorted(tensors)}."
        )
    weight, bias = tensors[_WEIGHT].float(), tensors[_BIAS].float()
    _check_shape(bias, weight.shape[:1])
    magnitude = tensors.get("steering_magnitude", torch.ones(())).float()
    activation = "relu"
    if "soft_threshold" in tensors:
        activation = "soft_threshold"
    elif "log_threshold" in tensors:
        activation = "jumprelu"
    if activation != "soft_threshold" and bool((magnitude <= 0).any()):
        raise ValueError(
            f"steering_magnitude must be positive to be folded into {activation}, found "
            f"{float(magnitude.min())}."
        )
    rows = magnitude.expand(weight.shape[:1])
    parameters = {"weight": weight * rows[:, None], "bias": bias * rows}
    if activation == "soft_threshold":
        # Odd in u: a negative magnitude turns u round and leaves the threshold positive.
        parameters["threshold"] = tensors["soft_threshold"].float().expand_as(bias) * rows.abs()
    elif activation == "jumprelu":
        parameters["log_threshold"] = tensors["log_threshold"].float().expand_as(bias) + rows.log()
    return activation, parameters


def _check_shape(tensor: Tensor, expected: tuple[int, ...] | torch.Size) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"Expected shape {tuple(expected)}, found {tuple(tensor.shape)}.")


def _find_sae(said: Mapping[str, Any]) -> Any:
    for release, sae_id in (("base_sae_release", "base_sae_id"), ("sae_release", "sae_id")):
        if said.get(release) and said.get(sae_id):
            return {"release": said[release], "sae_id": said[sae_id]}
    for name in ("sae_path", "sae"):
        if said.get(name):
            return said[name]
    raise ValueError(
        f"{CONFIG} names no SAE (looked for base_sae_release and base_sae_id, sae_release and "
        f"sae_id, sae_path, sae; found {sorted(said)}). Pass `sae`."
    )


def _find_layer(said: Mapping[str, Any], hook_name: str | None) -> int:
    for name in ("layer", "hook_layer", "sae_layer"):
        if said.get(name) is not None:
            return int(said[name])
    layer = parse_hook_layer(said.get("hook_name") or hook_name)
    if layer is None:
        raise ValueError(
            f"Neither {CONFIG} (found {sorted(said)}) nor the SAE's hook name {hook_name!r} says "
            "which layer was steered. Pass `layer`."
        )
    return layer
