"""The model card of an adapter: what was steered, how it was trained, what an audit found.

The audit's section stands between two comments, of which the first names the SHA-256 of the weights
that were audited. A card must not praise weights that nobody has looked at.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..files import compute_sha256
from ..tuner.config import FSRLConfig

CARD = "README.md"

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_PACKAGES = ("peft-fsrl", "peft", "trl", "transformers", "torch", "sae-lens", "datasets")

_START = "<!-- fsrl-audit:start weights={} -->"
_END = "<!-- fsrl-audit:end -->"
_SECTION = re.compile(
    rf"\n*{re.escape(_START).replace(re.escape('{}'), '([0-9a-f]{64})')}.*?{re.escape(_END)}\n*",
    flags=re.DOTALL,
)


def render_model_card(
    config: FSRLConfig,
    *,
    base_model: str | None,
    model_name: str,
    adapter_id: str,
    training: Mapping[str, Any],
    figures: Mapping[str, float],
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """A card with the metadata that the Hub reads and the figures that a reader needs.

    Args:
        config: of the adapter, after its SAE was loaded.
        base_model: name or path of the base model; None if it has none.
        model_name: title of the card.
        adapter_id: where the adapter will be found, a Hub id or a path.
        training: settings by name, shown in this order.
        figures: final numbers by name, shown in this order.
        dataset_name: Hub id of the training data, if it has one.
        tags: further tags.

    Returns:
        A card whose ``content`` is Markdown with a YAML header.
    """
    is_hub_id = base_model is not None and not Path(base_model).exists()
    card_data = ModelCardData(
        library_name="peft",
        base_model=base_model if is_hub_id else None,
        datasets=[dataset_name] if dataset_name else None,
        pipeline_tag="text-generation",
        tags=sorted({"fsrl", "peft_fsrl", "sparse-autoencoder", *tags}),
    )
    steering = {
        "layer": config.layer if config.layer is not None else config.target_modules,
        "steered features": _describe_choice(config),
        "rank": config.rank,
        "activation": config.activation,
        "non-negative feature activations": config.non_negative,
        "l1_coeff": config.l1_coeff,
        "l2_coeff": config.l2_coeff,
        "l0_coeff": config.l0_coeff,
        "penalty_reduction": config.penalty_reduction,
    }
    for name, info in (config.sae_info or {}).items():
        reference = config.sae[name] if name else config.sae
        label = f"layer {name}: SAE" if name else "SAE"
        steering |= {
            label: _describe_reference(reference),
            f"{label} hook": info.get("hook_name"),
            f"{label} features": info.get("d_sae"),
            f"{label} fingerprint (SHA-256)": info.get("fingerprint"),
        }
    return ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        model_name=model_name,
        base_model=base_model or "the base model it was trained on",
        adapter_id=adapter_id,
        steering=_cells(steering),
        training=_cells(training),
        figures=_cells(figures),
        versions=", ".join(_versions()),
    )


def put_section(card: str, body: str, weights: str) -> str:
    """A card with its section replaced, or added at the end.

    Args:
        card: Markdown.
        body: of the section, Markdown without comments.
        weights: SHA-256 of the file of weights that it is about.
    """
    # Said to the reader too: PEFT's own `save_pretrained` keeps what it finds in a card.
    about = f"Of the weights with SHA-256 `{weights}`; of others it says nothing."
    section = f"{_START.format(weights)}\n{body.strip()}\n\n{about}\n{_END}"
    return _append(_SECTION.sub("\n\n", card), section)


def weights_digest(folder: str | Path) -> str | None:
    """SHA-256 of the file of weights in an adapter's folder; None if it has none."""
    paths = [Path(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    files = [path for path in paths if path.is_file()]
    return compute_sha256(files[0]) if files else None


def keep_section(card: str, old_card: str | Path, folder: str | Path) -> str:
    """A new card with the section of an old one, if that is about the weights in ``folder``."""
    path = Path(old_card)
    found = _SECTION.search(path.read_text("utf-8")) if path.is_file() else None
    if found is None or found[1] != weights_digest(folder):
        return card
    return _append(card, found[0].strip())


def _append(card: str, section: str) -> str:
    return f"{card.rstrip()}\n\n{section}\n" if card.strip() else f"{section}\n"


def _describe_choice(config: FSRLConfig) -> str | None:
    if config.features is not None:
        return "only those listed in adapter_config.json"
    return None if config.exclude_features is None else "all but those in adapter_config.json"


def _describe_reference(reference: Any) -> str:
    if isinstance(reference, Mapping) and set(reference) == {"release", "sae_id"}:
        return f"{reference['release']}/{reference['sae_id']}"
    if isinstance(reference, str) and not Path(reference).exists() and "/" in reference:
        return reference
    return "a folder in SAELens's format"


def _cells(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = {name: value for name, value in values.items() if value is not None}
    return [(n, f"{v:.4g}" if isinstance(v, float) else str(v)) for n, v in shown.items()]


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
