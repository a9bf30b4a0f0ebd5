"""Whether weights that were trained under one config may go into an adapter of another."""

from __future__ import annotations

from typing import Any

from ..sae.loading import parse_hook

# What decides which numbers an adapter has and what they mean. Coefficients, starts and learning
# rates may differ: they are settings of a training run.
_FIELDS = (
    "features",
    "exclude_features",
    "rank",
    "activation",
    "non_negative",
    "modules_to_save",
)
_PLACES = (
    "layer",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)


def require_same_adapter(expected_config: Any, found_config: Any, where: str) -> None:
    """Refuse the weights of an adapter that steers something else, or otherwise.

    Args:
        expected_config: ``FSRLConfig`` of the adapter in use, after its SAE was loaded.
        found_config: ``FSRLConfig`` that lies beside the weights.
        where: the folder of these weights, for the message.

    Raises:
        ValueError: naming the first field that differs, with both values.
    """
    expected, found = _describe(expected_config), _describe(found_config)
    for name in [name for name in expected if name in found]:
        if expected[name] != found[name]:
            raise ValueError(
                f"The weights in {where} are of another adapter: expected "
                f"{name}={_short(expected[name])}, as in the config in use, found "
                f"{name}={_short(found[name])}. The same weights would steer something else here. "
                "Use the config that they were trained with, or train again."
            )


def _describe(config: Any) -> dict[str, Any]:
    """Plain values by field; without those that a config leaves to the SAE or the model."""
    infos = config.sae_info or {}
    places = {name: _plain(getattr(config, name)) for name in _PLACES}
    if config.layer is None and config.target_modules is None:
        # Elsewhere in a layer, the path of the steered module is known to the model alone.
        hook = parse_hook(infos[""].get("hook_name")) if "" in infos else None
        places = {"layer": hook.layer} if hook and hook.place == "resid_post" else {}
    layers = places.get("layer")
    if layers is not None:
        places["layer"] = layers = layers if isinstance(layers, list) else [layers]
        if "" in infos:
            infos = {str(layer): infos[""] for layer in layers}
    fingerprints = {key: info["fingerprint"] for key, info in infos.items()}
    saes = {"sae fingerprint": fingerprints} if fingerprints else {}
    return places | saes | {name: _plain(getattr(config, name)) for name in _FIELDS}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, tuple, set, frozenset)) else value


def _short(value: Any, limit: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
