"""vLLM's worker, whose model steers; the plugin puts it into vLLM's config by name.

The op ``peft_fsrl::steer`` stands inside the graph that vLLM compiles, opaque to the compiler, so
that it runs at every forward pass. A hook alone would run while the graph is traced and never
again.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.outputs import AsyncModelRunnerOutput

from ..training.rollouts import KEY
from ..tuner.events import SteeringEvent, TokenStatistics
from ..tuner.layer import FSRLLayer
from .adapters import Place, labeled_sae, load_adapters, load_served_labels, update_layer
from .counters import Counters
from .reports import Notes, add_notes
from .requests import Served, parse_request
from .rows import Span, steer_rows

_BASE = "vllm.v1.worker.cpu_worker.CPUWorker"
if not current_platform.is_cpu():
    _BASE = "vllm.v1.worker.gpu_worker.Worker"


@torch.library.custom_op("peft_fsrl::steer", mutates_args=("hidden", "residual"))
def _steer(hidden: Tensor, residual: Tensor | None, place: str) -> None:
    get_forward_context().no_compile_layers[place](hidden, residual)


@_steer.register_fake
def _(hidden: Tensor, residual: Tensor | None, place: str) -> None:
    return None


class SteeringWorker(resolve_obj_by_qualname(_BASE)):  # type: ignore[misc]
    """The platform's own worker, whose model steers."""

    fsrl: Steering

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model and put the steering into it, before anything is compiled."""
        super().load_model(*args, **kwargs)
        self.fsrl = Steering(self.vllm_config, self.model_runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step, whose tokens are steered as their requests ask."""
        with self.fsrl.step(scheduler_output):
            return super().execute_model(scheduler_output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """The end of a step, whose output carries what was noted of its tokens."""
        output, notes = super().sample_tokens(*args, **kwargs), self.fsrl.take_notes()
        if isinstance(output, AsyncModelRunnerOutput):
            return _WithNotes(output, notes) if notes else output
        if notes:
            setattr(output, KEY, notes)
        return output

    def update_steering(self, state: dict[str, Tensor]) -> None:
        """Replace the weights of the default adapter; for a trainer, by ``collective_rpc``."""
        self.fsrl.update(state)

    def update_steering_from_text(self, text: str) -> None:
        """The same over HTTP: a safetensors file in base64."""
        self.fsrl.update(load(base64.b64decode(text)))


class _WithNotes(AsyncModelRunnerOutput):
    def __init__(self, output: Any, notes: Notes) -> None:
        self._output, self._notes = output, notes

    def get_output(self) -> Any:
        output = self._output.get_output()
        setattr(output, KEY, self._notes)
        return output


class Steering:
    """The adapters of one worker, and which tokens of the running step belong to which request.

    Args:
        config: vLLM's.
        runner: its model runner, with a model.
    """

    def __init__(self, config: Any, runner: Any) -> None:
        self.served = Served(**config.additional_config[KEY])
        self._runner = runner
        model = config.model_config
        self._adapters = load_adapters(self.served.adapters, model.hf_config, model.dtype)
        self._counters = Counters(list(self.served.adapters))
        labels = {}
        if self.served.labels is not None:
            found = load_served_labels(self.served.labels, self._adapters).features
            labels = {each.feature: ", ".join(each.categories) for each in found}
        self._labels = labels
        self._labeled = labeled_sae(self._adapters).fingerprint
        self._requests: dict[str, tuple[Any, int]] = {}
        self._scheduled: Any = None
        self._spans: list[Span] | None = None
        self._notes: Notes = {}
        self._ran: set[str] = set()
        self._places: set[str] = set()
        self._attach(config, runner.get_model())

    def _attach(self, config: Any, model: nn.Module) -> None:
        by_place: dict[Place, dict[str, FSRLLayer]] = {}
        for adapter, layers in self._adapters.items():
            for place, layer in layers.items():
                by_place.setdefault(place, {})[adapter] = layer.to(self._runner.device)
                layer.statistics_observers.append(partial(self._count, adapter))
        for place, by_adapter in by_place.items():
            name = f"{KEY}.{place.name}"
            module = model.get_submodule(place.path_in(model))
            config.compilation_config.static_forward_context[name] = partial(
                self._steer, name, by_adapter
            )
            self._places.add(name)
            if place.reads_input:
                module.register_forward_pre_hook(partial(_before, name))
            else:
                module.register_forward_hook(partial(_after, name, not place.inside))

    @contextmanager
    def step(self, scheduler_output: Any) -> Iterator[None]:
        """Know the requests of a step while it runs.

        Raises:
            RuntimeError: if the model ran and a steered module was not among what ran.
        """
        for name in scheduler_output.finished_req_ids:
            self._requests.pop(name, None)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params or new.pooling_params
            asked = parse_request(getattr(params, "extra_args", None), self.served)
            n_prompt = len(new.prompt_token_ids or new.prompt_embeds)
            self._requests[new.req_id] = asked, n_prompt
        self._scheduled, self._spans = scheduler_output, None
        self._ran.clear()
        try:
            yield
            self._require_all_ran(scheduler_output.total_num_scheduled_tokens)
        finally:
            self._scheduled = None
        self._counters.flush()

    def take_notes(self) -> Notes:
        """What was noted since this was last called."""
        notes, self._notes = self._notes, {}
        return notes

    def update(self, state: dict[str, Tensor]) -> None:
        """Replace the weights of the default adapter by others of the same features."""
        for layer in self._adapters[self.served.default].values():
            update_layer(layer, state)

    def _require_all_ran(self, n_tokens: int) -> None:
        if n_tokens and (missing := self._places - self._ran):
            raise RuntimeError(
                f"The model ran without its steering at {sorted(missing)}: its output would be "
                "the base model's. Start with enforce_eager=True (--enforce-eager), and report "
                "this with the versions of vLLM and peft_fsrl."
            )

    def _steer(
        self, place: str, layers: dict[str, FSRLLayer], hidden: Tensor, residual: Tensor | None
    ) -> None:
        if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "The steering was about to be frozen into a CUDA graph. Start with "
                "compilation_config={'cudagraph_mode': 'PIECEWISE'} or enforce_eager=True."
            )
        self._ran.add(place)
        x = hidden if residual is None else hidden + residual
        spans = self._current_spans(x.shape[0])
        reports = any(span.request.features for span in spans)
        watcher = partial(self._report, place) if reports else None
        for rows, steered in steer_rows(x, layers, spans, watcher):
            hidden[rows] = steered
            if residual is not None:
                residual[rows] = 0

    def _current_spans(self, n_rows: int) -> list[Span]:
        if self._scheduled is None:
            # A trial run that measures memory or compiles: all of it by the default adapter.
            return [Span(0, n_rows, 0, n_rows, parse_request(None, self.served))]
        if self._spans is None:
            self._spans, start = [], 0
            batch = self._runner.input_batch
            for row, name in enumerate(batch.req_ids):
                stop = start + self._scheduled.num_scheduled_tokens[name]
                position = int(batch.num_computed_tokens_cpu[row])
                request, n_prompt = self._requests[name]
                self._spans.append(Span(start, stop, position, n_prompt, request, name))
                start = stop
        return self._spans

    def _count(self, adapter: str, found: TokenStatistics) -> None:
        if self._scheduled is not None:
            self._counters.add(adapter, found.l0, found.nonfinite)

    def _report(self, place: str, spans: Sequence[Span], event: SteeringEvent) -> None:
        labels = self._labels if event.sae.info.fingerprint == self._labeled else {}
        add_notes(self._notes, place.removeprefix(f"{KEY}."), spans, event, labels)


def _before(place: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    torch.ops.peft_fsrl.steer(args[0], None, place)


def _after(place: str, whole_layer: bool, module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        torch.ops.peft_fsrl.steer(output, None, place)
        return
    # Of a decoder layer: what it adds to the residual stream, and the stream without it.
    pair = isinstance(output, tuple) and len(output) == 2
    if not (whole_layer and pair and all(isinstance(each, Tensor) for each in output)):
        raise ValueError(
            f"Expected {type(module).__name__} to return hidden states, found {type(output)}. Its "
            "output cannot be steered in vLLM."
        )
    torch.ops.peft_fsrl.steer(*output, place)
