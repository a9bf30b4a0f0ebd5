"""``FSRLLayer``: steers the output of the module that it wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional, fused
from .._sparse import can_select, is_short
from .._tracing import is_traced
from ..sae.frozen import FrozenSAE
from ._watch import PenaltyWatch
from .adapter import SteeringAdapter
from .config import FSRLConfig
from .events import (
    Observer,
    StatisticsObserver,
    SteeringEvent,
    TokenStatistics,
    nonfinite_tokens,
    token_statistics,
)
from .outputs import hidden_states_of, replace_hidden_states

Edit = Callable[[Tensor, FrozenSAE], Tensor]

# The steered output, ||v||_1, the count of open gates, and what makes statistics of all that.
_Result = tuple[Tensor, Tensor | None, Tensor | None, Callable[[], TokenStatistics]]


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

    Attributes:
        observers: called with a ``SteeringEvent`` after every application.
        statistics_observers: called with ``TokenStatistics``, for which no steering vector needs to
            be kept.
        edits: applied in order to the steering vector, with the SAE, before it acts.
        batch_adapter_names: which adapter steers each sample of the batch; None for the active one.
        recomputes_alone: under gradient checkpointing, of which the wrapped module has no need.
    """

    adapter_layer_names = ("fsrl_adapter",)
    other_param_names = ("fsrl_sae", "_watches")

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        # Every layer of PEFT has them; what it wraps here (a decoder layer, an embedding) may not.
        self.in_features = getattr(base_layer, "in_features", None)
        self.out_features = getattr(base_layer, "out_features", None)
        self.fsrl_adapter = nn.ModuleDict()
        self.fsrl_sae: dict[str, FrozenSAE] = {}
        self.observers: list[Observer] = []
        self.statistics_observers: list[StatisticsObserver] = []
        self.edits: list[Edit] = []
        self._watches: dict[str, PenaltyWatch] = {}
        self.batch_adapter_names: list[str] | None = None
        self.recomputes_alone = False
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._hook = base_layer.register_forward_hook(self._steer_output, prepend=True)

    def update_layer(self, adapter_name: str, config: FSRLConfig, sae: FrozenSAE) -> None:
        """Add an adapter, or replace the one of that name, and make it active."""
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        adapter = SteeringAdapter(sae.info.d_in, sae.n_features, config, device, dtype)
        self.fsrl_adapter[adapter_name] = adapter
        self.fsrl_sae[adapter_name] = sae
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
        if self.disable_adapters:
            return output
        if self.batch_adapter_names is not None:
            steered = self._steer_samples(hidden_states_of(output), self.batch_adapter_names)
            return replace_hidden_states(output, steered)
        for name in self.active_adapters:
            if name in self.fsrl_adapter:
                output = replace_hidden_states(output, self._steer(name, hidden_states_of(output)))
        return output

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
        fast = not self.observers and self._can_fuse(adapter, sae, x)
        steer = self._steer_fused if fast else self._steer_plainly
        # A compiler cannot follow what the watch notes during a backward pass.
        watched = self.training and adapter.penalised and adapter.weight.requires_grad
        watched = watched and not is_traced()
        measured = bool(self.observers or self.statistics_observers) or watched
        output, l1, open_gates, describe = steer(adapter_name, adapter, sae, x, measured)
        if watched and l1 is not None and l1.requires_grad:
            self._watches[adapter_name].follow(output, l1, open_gates)
        if self.statistics_observers:
            statistics = describe()
            for observer in self.statistics_observers:
                observer(statistics)
        return output

    def _can_fuse(self, adapter: SteeringAdapter, sae: FrozenSAE, x: Tensor) -> bool:
        """Whether ``fused.steer`` does what is asked of this layer."""
        # A frozen adapter is differentiated by analyses, which may do so twice, or in batches.
        only_x = torch.is_grad_enabled() and x.requires_grad and not adapter.weight.requires_grad
        reads_less = is_short(x) and can_select(x, *_parameters(adapter))
        return not (self.edits or sae.contextual or only_x or reads_less or is_traced())

    def _steer_fused(
        self, adapter_name: str, adapter: SteeringAdapter, sae: FrozenSAE, x: Tensor, measured: bool
    ) -> _Result:
        operation = fused.Operation(
            sae,
            adapter.activation,
            adapter.bandwidth,
            clamps=_clamps(adapter, sae),
            measures=measured,
            recomputes=self._recomputes(),
        )
        steered = fused.steer(operation, x, *_parameters(adapter))

        def describe() -> TokenStatistics:
            assert steered.l1 is not None
            assert steered.l0 is not None
            assert steered.l2 is not None
            return TokenStatistics(
                self.layer_name,
                adapter_name,
                l0=steered.l0,
                l1=steered.l1,
                l2=steered.l2,
                open_gates=steered.open_gates,
                nonfinite=nonfinite_tokens(x, steered.l1),
            )

        return steered.output, steered.l1, steered.open_gates, describe

    def _steer_plainly(
        self, adapter_name: str, adapter: SteeringAdapter, sae: FrozenSAE, x: Tensor, measured: bool
    ) -> _Result:
        edits = list(self.edits)
        clamps = _clamps(adapter, sae)

        def steer(
            x: Tensor, weight: Tensor, bias: Tensor, down: Tensor | None, threshold: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
            selects = can_select(x, weight, bias, down, threshold)
            steered = functional.steer(
                x,
                functional.steering_pre(sae.process_in(x), weight, bias, down),
                threshold,
                activation=adapter.activation,
                bandwidth=adapter.bandwidth,
                encode=(lambda v: sae.encode(x, v < 0 if selects else None)) if clamps else None,
                decode_update=lambda update: sae.decode_update(update, x, selects),
                edit=(lambda v: _apply_edits(edits, v, sae)) if edits else None,
            )
            v, gate = steered.steering_vector, steered.gate
            if not measured:
                return steered.output, v, gate, None, None
            open_gates = None if gate is None else gate.sum(dim=-1)
            return steered.output, v, gate, functional.token_l1(v), open_gates

        if self._recomputes():
            # The base model's checkpoints do not cover this hook, which makes the widest tensors of
            # all. What the penalty needs is reduced inside, so that none of them is kept.
            output, v, gate, l1, open_gates = checkpoint(
                steer, x, *_parameters(adapter), use_reentrant=False, preserve_rng_state=False
            )
        else:
            output, v, gate, l1, open_gates = steer(x, *_parameters(adapter))
        event = SteeringEvent(self.layer_name, adapter_name, x, v, gate, sae, l1, open_gates)
        for observer in self.observers:
            observer(event)
        return output, l1, open_gates, partial(token_statistics, event)

    def _recomputes(self) -> bool:
        """Whether the wrapped module is recomputed in the backward pass, and steering with it."""
        checkpointed = bool(getattr(self.base_layer, "gradient_checkpointing", False))
        return (checkpointed or self.recomputes_alone) and self.training and torch.is_grad_enabled()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FSRLLayer:
        super()._apply(fn, recurse)
        for name, sae in self.fsrl_sae.items():
            moved = fn(torch.empty(0, device=sae.device, dtype=sae.dtype))
            if moved.device.type != "meta":
                self.fsrl_sae[name] = sae.to(moved.device, moved.dtype)
        return self

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
                return torch.device(device), parameter.dtype
        return None, None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # transformers reads attributes of its decoder layers (`attention_type`, ...). Private
            # ones stay private: wrappers of other libraries recognise their own layers by them.
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


def _clamps(adapter: SteeringAdapter, sae: FrozenSAE) -> bool:
    return adapter.non_negative and not sae.signed


def _parameters(adapter: SteeringAdapter) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return adapter.weight, adapter.bias, adapter.down, adapter.threshold_parameter


def _apply_edits(edits: list[Edit], v: Tensor, sae: FrozenSAE) -> Tensor:
    for edit in edits:
        v = edit(v, sae)
    return v
