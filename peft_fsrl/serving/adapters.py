"""Adapters as a server loads them: by PEFT's own loading, onto a model without weights.

Every check that ``PeftModel.from_pretrained`` makes of a folder is made here, because it is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..analysis.labels import Labels, load_labels
from ..sae.frozen import SAEInfo
from ..steering import fsrl_layers
from ..tuner.adapter import SteeringAdapter
from ..tuner.config import FSRLConfig
from ..tuner.layer import FSRLLayer
from ..tuner.placement import decoder_layers, reads_heads
from .requests import Served


class Place(NamedTuple):
    """A steered module, whatever its path is called in a server's own model.

    Attributes:
        layer: index of the decoder layer.
        inside: path of the module inside it; empty for the layer itself.
        reads_input: steered is what the module reads, and not what it returns.
    """

    layer: int
    inside: str
    reads_input: bool

    @property
    def name(self) -> str:
        """Short text for messages and reports."""
        name = f"layers.{self.layer}.{self.inside}".removesuffix(".")
        return f"{name} (input)" if self.reads_input else name

    def path_in(self, model: nn.Module) -> str:
        """Its path in a model, a server's as well as transformers'.

        Raises:
            ValueError: if the model has no such module.
        """
        path = f"{decoder_layers(model)[self.layer]}.{self.inside}".removesuffix(".")
        if not any(name == path for name, _ in model.named_modules()):
            layer = model.get_submodule(decoder_layers(model)[self.layer])
            raise ValueError(
                f"Expected a module {path} in {type(model).__name__}, which the adapter steers, "
                f"found only {[name for name, _ in layer.named_children()]} in that layer. This "
                "server's model is structured differently from transformers': steer whole "
                "decoder layers."
            )
        return path


Adapters = dict[str, dict[Place, FSRLLayer]]


def parse_sources(text: str) -> dict[str, str]:
    """Adapters by name from ``"folder"``, or ``"name=folder,other=folder"``; the first is default.

    Raises:
        ValueError: for an adapter without a folder, or two of one name.
    """
    sources: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, source = part.partition("=")
        name, source = (name.strip(), source.strip()) if equals else ("default", part)
        if not name or not source or name in sources:
            raise ValueError(
                "Expected PEFT_FSRL_ADAPTER to be a folder or Hub repository, or several as "
                f"'name=folder,other=folder' with a name each; found {text!r}."
            )
        sources[name] = source
    return sources


def load_adapters(sources: Mapping[str, str], config: Any, dtype: torch.dtype) -> Adapters:
    """The steering layers of each adapter, around the identity: they steer what they are given.

    Args:
        sources: folder or Hub repository by name.
        config: transformers' config of the base model.
        dtype: of the base model.

    Raises:
        ValueError: whatever ``PeftModel.from_pretrained`` refuses, and what a server cannot do.
        FileNotFoundError: no adapter there, or no SAE.
    """
    return {name: _load(source, config, dtype) for name, source in sources.items()}


def describe(sources: Mapping[str, str], adapters: Adapters, labels: str | None) -> Served:
    """What is served, in plain values.

    Args:
        sources: as they were given.
        adapters: as they were loaded.
        labels: file of labels about the default adapter's SAE.
    """
    sizes, categories, labeled = {}, {}, []
    for name, layers in adapters.items():
        infos = [layer.fsrl_sae["default"].info for layer in layers.values()]
        sizes[name] = min(info.d_sae for info in infos)
        if {info.fingerprint for info in infos} == {labeled_sae(adapters).fingerprint}:
            labeled.append(name)
    if labels is not None:
        found = load_served_labels(labels, adapters)
        categories = {category: found.members(category) for category in found.categories}
    places = {name: [place.name for place in layers] for name, layers in adapters.items()}
    return Served(dict(sources), sizes, places, labels, categories, labeled)


def labeled_sae(adapters: Adapters) -> SAEInfo:
    """The SAE that labels are about: that of the default adapter, at its first place."""
    first = next(iter(next(iter(adapters.values())).values()))
    return first.fsrl_sae["default"].info


def load_served_labels(path: str, adapters: Adapters) -> Labels:
    """Labels that fit the SAE that they must be about."""
    info = labeled_sae(adapters)
    return load_labels(path, d_sae=info.d_sae, fingerprint=info.fingerprint)


def update_layer(layer: FSRLLayer, state: Mapping[str, Tensor]) -> None:
    """Put other weights into a served layer.

    Args:
        layer: from ``load_adapters``.
        state: of PEFT's ``get_peft_model_state_dict``.

    Raises:
        ValueError: for weights of other features, of other shapes, or of another place.
    """
    adapter = layer.fsrl_adapter["default"]
    assert isinstance(adapter, SteeringAdapter)
    start = f"base_model.model.{layer.layer_name}.fsrl_adapter."
    own = {k.removeprefix(start): tensor for k, tensor in state.items() if k.startswith(start)}
    identity = own.get("identity")
    if identity is None or not torch.equal(identity.cpu(), adapter.identity.cpu()):
        raise ValueError(
            f"Expected weights of the features that are served at {layer.layer_name}, found "
            f"{'those of others' if own else 'none'}. Start the server with the adapter that is "
            "being trained."
        )
    adapter.load_state_dict(own)


def _load(source: str, config: Any, dtype: torch.dtype) -> dict[Place, FSRLLayer]:
    hollow = _hollow_model(config, dtype)
    adapter_config = FSRLConfig.from_pretrained(source)
    if not isinstance(adapter_config, FSRLConfig):
        raise ValueError(
            f"Expected an FSRL adapter in {source}, found one of {adapter_config.peft_type}. Give "
            "that one to the server's own option for it (vLLM: --enable-lora)."
        )
    if adapter_config.modules_to_save:
        raise ValueError(
            f"The adapter in {source} comes with fully trained modules "
            f"({adapter_config.modules_to_save}), which a server of the base model does not have. "
            "Serve an adapter that was trained without `modules_to_save`."
        )
    _warn_of_other_base(source, adapter_config.base_model_name_or_path, config)
    model = PeftModel.from_pretrained(
        hollow, source, config=adapter_config, torch_device="cpu", is_trainable=False
    )
    stacks = {path: index for index, path in decoder_layers(hollow).items()}
    found = {}
    for path, layer in fsrl_layers(model).items():
        owner = next((each for each in stacks if f"{path}.".startswith(f"{each}.")), None)
        if owner is None:
            raise ValueError(
                f"The adapter in {source} steers {path}, which lies in no decoder layer. A server "
                "steers decoder layers and what they are made of."
            )
        sae = layer.fsrl_sae["default"]
        if sae.contextual:
            raise ValueError(
                f"The SAE of the adapter in {source} is of architecture {sae.info.architecture}, "
                "which reads whole sequences; a server sees a few tokens at a time. Generate with "
                "transformers and `use_cache=False`."
            )
        place = Place(stacks[owner], path[len(owner) + 1 :], reads_heads(sae))
        found[place] = _around_identity(layer)
    return found


def _warn_of_other_base(source: str, trained_on: str | None, config: Any) -> None:
    served = getattr(config, "name_or_path", None)
    names = [Path(name).name.lower() for name in (trained_on, served) if name]
    if len(set(names)) == 2:
        warnings.warn(
            f"The adapter in {source} was trained on {trained_on!r}, and {served!r} is served. "
            "They have the same shape, but an adapter for one may mean nothing on the other. "
            "Ignore this if it is the same model, or a fine-tuned version.",
            stacklevel=2,
        )


def _hollow_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The base model's modules with empty parameters: enough to say where an adapter belongs."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(0, dtype=parameter.dtype, device="cpu")
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return model


def _around_identity(layer: FSRLLayer) -> FSRLLayer:
    bare = FSRLLayer(nn.Identity(), layer.layer_name)
    bare.fsrl_adapter, bare.fsrl_sae = layer.fsrl_adapter, layer.fsrl_sae
    bare.set_adapter("default", inference_mode=True)
    return bare.eval()
