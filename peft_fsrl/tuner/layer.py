"""``FSRLLayer``: steers the output of the module that it wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional
from ..functional import Steered
from ..sae.frozen import FrozenSAE
from .adapter import SteeringAdapter
from .compile import compiles, run_compiled
from .config import FSRLConfig
from .events import (
    Edit,
    Observer,
    Scoped,
    StatisticsObserver,
    SteeringEvent,
    describe_norms,
    open_values,
)
from .outputs import hidden_states_of, replace_hidden_states
from .watch import PenaltyWatch


class FSRLLayer(nn.Module, BaseTunerLayer):
    """``x' = x + decode(relu(f + v)) - decode(f)`` on the output ``x`` of a wrapped module.

    With ``non_negative=False`` in the config, ``x' = x + decode(f + v) - decode(f)``.

    The steering happens in a forward hook that comes first on the wrapped module, so that whatever
    else looks at that module's output (``output_hidden_states`` among others) sees what the next
    layer sees. The SAE is held outside the module tree: it is not a parameter, not a buffer, not in
    any checkpoint, and not broadcast between processes.

    Args:
        base_layer: the module whose output is steered; a tensor, or a tuple that starts with one.
        layer_name: its path in the base model, for messages and records.
        steers_input: steer what the module reads, and not what it returns: the place of SAEs that
            were trained on the concatenated heads of an attention layer.

    Attributes:
        fsrl_config: by adapter, the config as it is used here: with the SAE's identity, and not the
            object that the user passed and may have changed.
        observers: called with a ``SteeringEvent`` after every application. This list and the others
            may hold a ``Scoped`` entry, which counts only where it was opened.
        statistics_observers: called with ``TokenStatistics``, for which no steering vector needs to
            be kept.
        controls: called with this layer, an adapter's name and its input before that adapter acts;
            may change the adapter.
        edits: applied in order to the steering vector, with the SAE, before it acts.
        batch_adapter_names: the last entry says which adapter steers each sample of the batch;
            where there is none, the active one does.
    """

    adapter_layer_names = ("fsrl_adapter",)
    other_param_names = ("fsrl_sae", "fsrl_config", "_watches")

    def __init__(self, base_layer: nn.Module, layer_name: str, steers_input: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        # Every layer of PEFT has them; what it wraps here (a decoder layer, an embedding) may not.
        self.in_features = getattr(base_layer, "in_features", None)
        self.out_features = getattr(base_layer, "out_features", None)
        self.fsrl_adapter = nn.ModuleDict()
        self.fsrl_sae: dict[str, FrozenSAE] = {}
        self.fsrl_config: dict[str, FSRLConfig] = {}
        self.observers: list[Observer] = []
        self.statistics_observers: list[StatisticsObserver] = []
        self.controls: list[Callable[[FSRLLayer, str, Tensor], None]] = []
        self.edits: list[Edit] = []
        self.batch_adapter_names: list[Any] = []
        self._watches: dict[str, PenaltyWatch] = {}
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        if steers_input:
            self._hook = base_layer.register_forward_pre_hook(self._steer_input, prepend=True)
        else:
            self._hook = base_layer.register_forward_hook(self._steer_output, prepend=True)

    def update_layer(self, adapter_name: str, config: FSRLConfig, sae: FrozenSAE) -> None:
        """Add an adapter, or replace the one of that name, and make it active."""
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        adapter = SteeringAdapter(sae.info.d_in, sae.n_features, config, device, dtype)
        if config.starts_from_encoder:
            adapter.start_from_encoder(*sae.encoder_rows(), config.init_scale)
        adapter.identify(sae.info.fingerprint, sae.features)
        self.fsrl_adapter[adapter_name] = adapter
        self.fsrl_sae[adapter_name] = sae
        self.fsrl_config[adapter_name] = config
        self._watches[adapter_name] = PenaltyWatch(adapter_name)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def keep_features(self, adapter_name: str, features: Iterable[int]) -> None:
        """Drop all features of an adapter but some, for good; see ``pruning.prune``.

        Raises:
            IndexError: for an index that the SAE does not have.
            ValueError: for no feature, or one that the adapter cannot steer.
        """
        sae = self.fsrl_sae[adapter_name]
        restricted = sae.restrict(features)
        adapter = self.fsrl_adapter[adapter_name]
        assert isinstance(adapter, SteeringAdapter)
        adapter.keep_rows(sae.positions(restricted.feature_index.tolist()))
        adapter.identify(restricted.info.fingerprint, restricted.features)
        self.fsrl_sae[adapter_name] = restricted

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter active; at most one per layer.

        Raises:
            ValueError: for two adapters on this layer. Each was trained on the unsteered output,
                and the non-negativity of feature activations does not distribute over a sum.
        """
        names = self.require_one(adapter_names)
        super().set_adapter(names, inference_mode=inference_mode)

    def require_one(self, adapter_names: str | list[str]) -> list[str]:
        """The names as a list, of which at most one may be an adapter of this layer.

        Raises:
            ValueError: as ``set_adapter`` does.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        here = [name for name in names if name in self.fsrl_adapter]
        if len(here) > 1:
            raise ValueError(
                f"Only one FSRL adapter can be active on a layer, got {here} on "
                f"'{self.layer_name}'. Activate one of them."
            )
        return names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module, whose hook steers."""
        return self.base_layer(*args, **kwargs)

    def detach_hook(self) -> nn.Module:
        """Stop steering for good and return the wrapped module, as ``unload`` needs it."""
        self._hook.remove()
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: no change of the weights equals an update that depends on the input."""
        raise ValueError(merge_refusal())

    def unmerge(self) -> None:
        """Refuse, as ``merge`` does."""
        raise ValueError(merge_refusal())

    def _steer_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden_states = hidden_states_of(output)
        steered = self._steer_all(hidden_states)
        return output if steered is hidden_states else replace_hidden_states(output, steered)

    def _steer_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._steer_all(args[0]), *args[1:]

    def _steer_all(self, x: Tensor) -> Tensor:
        if self.disable_adapters:
            return x
        if self.batch_adapter_names and (names := open_values(self.batch_adapter_names)):
            return self._steer_samples(x, names[-1])
        for name in self.active_adapters:
            if name in self.fsrl_adapter:
                x = self._steer(name, x)
        return x

    def acting_adapters(self) -> set[str]:
        """The adapters of this layer that steer here and now."""
        names = open_values(self.batch_adapter_names)
        return {*(names[-1] if names else self.active_adapters)} & set(self.fsrl_adapter)

    def _steer_samples(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Steer each sample with its own adapter; names that are not on this layer steer nothing.

        Raises:
            ValueError: for another number of names than samples.
        """
        if len(adapter_names) != x.shape[0]:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {x.shape[0]} respectively. Give one name per sample."
            )
        steered = x.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.fsrl_adapter:
                rows = [row for row, other in enumerate(adapter_names) if other == name]
                index = torch.tensor(rows, device=x.device)
                steered = steered.index_copy(0, index, self._steer(name, x[index]))
        return steered

    def _steer(self, adapter_name: str, x: Tensor) -> Tensor:
        adapter = self.fsrl_adapter[adapter_name]
        assert isinstance(adapter, SteeringAdapter)
        sae = self.fsrl_sae[adapter_name]
        if x.shape[-1] != sae.info.d_in:
            raise ValueError(
                f"'{self.layer_name}' gives activations of width {x.shape[-1]}, but the SAE of "
                f"adapter '{adapter_name}' reads width {sae.info.d_in}. Use an SAE that was "
                "trained on this module's output."
            )
        if sae.device != x.device:
            sae = self.fsrl_sae[adapter_name] = sae.to(x.device, sae.dtype)
        for control in open_values(self.controls):
            control(self, adapter_name, x)
        observers, edits = open_values(self.observers), open_values(self.edits)
        statistics = open_values(self.statistics_observers)
        # A compiler cannot follow what the watch notes during a backward pass.
        watched = self.training and adapter.penalized and adapter.trains
        watched = watched and not torch.compiler.is_compiling()
        steered = self._apply_adapter(
            x, adapter, sae, edits, measures=bool(statistics) or watched, keeps=bool(observers)
        )
        norms = steered.norms
        if watched and norms is not None and norms.l1.requires_grad:
            self._watches[adapter_name].follow(steered.output, norms.l1, norms.l2, norms.open_gates)
        if observers:
            assert steered.steering_vector is not None
            place = (self.layer_name, adapter_name)
            event = SteeringEvent(*place, x, steered.steering_vector, steered.gate, sae)
            for observer in observers:
                observer(event)
        if statistics:
            assert norms is not None
            found = describe_norms(self.layer_name, adapter_name, x, norms)
            for observer in statistics:
                observer(found)
        return steered.output

    def _apply_adapter(
        self,
        x: Tensor,
        adapter: SteeringAdapter,
        sae: FrozenSAE,
        edits: list[Edit],
        *,
        measures: bool,
        keeps: bool,
    ) -> Steered:
        plain = partial(
            functional.steer,
            sae=sae,
            activation=adapter.activation,
            bandwidth=adapter.bandwidth,
            clamps=adapter.non_negative and not sae.signed,
            edit=partial(_apply_edits, edits, sae) if edits else None,
            measures=measures,
            keeps_vector=keeps,
        )
        steer: Callable[..., Steered] = plain
        # A frozen adapter is differentiated by analyses, which may do so twice, or in batches.
        trains = adapter.trains or not (torch.is_grad_enabled() and x.requires_grad)
        if not (edits or keeps or sae.contextual) and trains and compiles(adapter.compiles, x):
            steer = partial(run_compiled, plain)
        parameters = (adapter.weight, adapter.bias, adapter.down, adapter.threshold_parameter)
        if self._recomputes():
            # The base model's checkpoints do not cover this hook, which makes the widest tensors of
            # all. What the penalty needs is reduced inside, so that none of them is kept.
            steered: Steered = checkpoint(
                steer, x, *parameters, use_reentrant=False, preserve_rng_state=False
            )
            return steered
        return steer(x, *parameters)

    def _recomputes(self) -> bool:
        """Whether the wrapped module is recomputed in the backward pass, and steering with it."""
        checkpointed = bool(getattr(self.base_layer, "gradient_checkpointing", False))
        return checkpointed and self.training and torch.is_grad_enabled()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FSRLLayer:
        super()._apply(fn, recurse)
        for name, sae in self.fsrl_sae.items():
            moved = fn(torch.empty(0, device=sae.device, dtype=sae.dtype))
            if moved.device.type != "meta":
                self.fsrl_sae[name] = sae.to(moved.device, moved.dtype)
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """PEFT's own; it casts to the base's dtype, and later widens parameters, not buffers."""
        if adapter_name in self.fsrl_adapter:
            adapter = self.fsrl_adapter[adapter_name]
            buffers = dict(adapter.named_buffers())
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            for name, buffer in buffers.items():
                setattr(adapter, name, buffer.to(getattr(adapter, name).device))

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # An offloaded layer's parameters live on `meta`; its hooks know where it computes.
        hooks = (getattr(module, "_hf_hook", None) for module in base_layer.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        execution_device = next((device for device in devices if device is not None), None)
        for parameter in base_layer.parameters():
            if parameter.is_floating_point():
                device = parameter.device if execution_device is None else execution_device
                # Eight bits are a format for storage: an adapter is not trained in them.
                dtype = torch.float32 if parameter.element_size() == 1 else parameter.dtype
                return torch.device(device), dtype
        return None, None

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside a `with` block is not part of it.
        lists = ("observers", "statistics_observers", "controls", "edits", "batch_adapter_names")
        kept = {n: [v for v in getattr(self, n) if not isinstance(v, Scoped)] for n in lists}
        return {**self.__dict__, **kept}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # transformers reads attributes of its decoder layers (`attention_type`, ...). Private
            # ones stay private: wrappers of other libraries recognize their own layers by them.
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "fsrl." + super().__repr__()


def merge_refusal() -> str:
    """Why an FSRL adapter cannot be merged into the weights."""
    return (
        "An FSRL adapter cannot be merged into the base model: what it adds to a layer's output "
        "depends on the input through which features cross their thresholds, so no fixed change of "
        "the weights equals it. Keep the adapter, and use `unload()` to get the base model back."
    )


def _apply_edits(edits: list[Edit], sae: FrozenSAE, v: Tensor) -> Tensor:
    for edit in edits:
        v = edit(v, sae)
    return v
