"""The entry point ``vllm.general_plugins``: steering for ``vllm serve`` and ``LLM(...)``.

vLLM calls ``register`` in each of its processes. With ``PEFT_FSRL_ADAPTER`` set, the configs that
are made there name a worker and a scheduler of ours, and requests are read as they come in.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

from ..training.rollouts import KEY, offered_adapter
from .requests import PREFIX, Served, SteeringRequest, parse_request

ADAPTER, LABELS = "PEFT_FSRL_ADAPTER", "PEFT_FSRL_LABELS"
TESTED = ("0.32.0", "0.32.0")
_OP = "peft_fsrl::steer"
_WORKERS = ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker")
_registered = False


def register() -> None:
    """Extend vLLM in this process; a second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    EngineArgs.create_engine_config = _steering_config(EngineArgs.create_engine_config)
    InputProcessor.process_inputs = _steered_inputs(InputProcessor.process_inputs)


def warn_of_version() -> None:
    """Warn of a vLLM in which nobody has tried this."""
    import vllm
    from packaging.version import Version

    oldest, newest = map(Version, TESTED)
    if not oldest <= Version(vllm.__version__.partition("+")[0]) <= newest:
        warnings.warn(
            f"peft_fsrl was tested with vLLM {' to '.join(dict.fromkeys(TESTED))}, found "
            f"{vllm.__version__}. If steering is refused or fails, install a tested version.",
            stacklevel=2,
        )


def _steering_config(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters = offered_adapter() or os.environ.get(ADAPTER)
        if not adapters:
            return original(self, *args, **kwargs)
        warn_of_version()
        # The second runner keeps its batch elsewhere; where Triton is, it is the default.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        config = original(self, *args, **kwargs)
        steer_config(config, adapters, os.environ.get(LABELS) or None)
        return config

    return create_engine_config


def steer_config(config: Any, adapters: str, labels: str | None) -> None:
    """Put adapters into a config of vLLM, after everything about them was checked.

    Args:
        config: a ``VllmConfig``, which is changed.
        adapters: see ``adapters.parse_sources``.
        labels: file of labels, or None.

    Raises:
        ValueError: for what cannot be steered: adapters that do not fit the model, several ranks,
            speculative decoding, a worker or scheduler of somebody else's.
    """
    # Only here: every process of every vLLM on this machine imports this module.
    from .adapters import describe, load_adapters, parse_sources
    from .counters import publish

    _require_plain(config)
    sources = parse_sources(adapters)
    model = config.model_config
    found = load_adapters(sources, model.hf_config, model.dtype)
    served = describe(sources, found, labels)
    # Part of the key of vLLM's compile cache: no graph without steering is found under it.
    config.additional_config = {**config.additional_config, KEY: served.to_dict()}
    config.parallel_config.worker_cls = "peft_fsrl.serving.worker.SteeringWorker"
    kind = "Async" if config.scheduler_config.async_scheduling else ""
    config.scheduler_config.scheduler_cls = f"peft_fsrl.serving.scheduler.Reporting{kind}Scheduler"
    compilation = config.compilation_config
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        compilation.cudagraph_mode = type(compilation.cudagraph_mode).PIECEWISE
    if compilation.splitting_ops:
        # Between the pieces that become CUDA graphs, Python runs.
        compilation.splitting_ops = [*compilation.splitting_ops, _OP]
    publish(list(served.adapters))


def _require_plain(config: Any) -> None:
    parallel = config.parallel_config
    for kind in ("tensor", "pipeline", "prefill_context", "data"):
        name = f"{kind}_parallel_size"
        size = getattr(parallel, name)
        if size != 1:
            raise ValueError(
                f"FSRL adapters are served by one rank, found {name}={size}: what is steered would "
                f"be spread over several. Set {name}=1, and start several servers instead."
            )
    if parallel.use_ubatching:
        raise ValueError(
            "FSRL adapters are steered in whole batches: leave enable_dbo and ubatch_size out."
        )
    if config.use_v2_model_runner:
        raise ValueError(
            "FSRL adapters need vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0."
        )
    if config.speculative_config is not None:
        raise ValueError(
            "FSRL adapters are not served with speculative decoding: set no speculative_config."
        )
    if parallel.worker_cls not in _WORKERS:
        raise ValueError(
            f"FSRL adapters need one of vLLM's own workers ({', '.join(_WORKERS)}), found "
            f"{parallel.worker_cls}. This platform, or worker_cls, cannot be steered."
        )
    if config.scheduler_config.scheduler_cls is not None:
        raise ValueError(
            f"FSRL adapters need vLLM's own scheduler, found scheduler_cls="
            f"{config.scheduler_config.scheduler_cls}. Leave it out."
        )
    if not isinstance(config.additional_config, dict):
        raise ValueError("FSRL adapters need additional_config to be a mapping.")


def _read_request(params: Any, served: Served | None) -> SteeringRequest | None:
    extra = getattr(params, "extra_args", None)
    if served is None:
        if ours := sorted(key for key in extra or () if str(key).startswith(PREFIX)):
            raise ValueError(
                f"{ours[0]} asks for steering, but no FSRL adapter is loaded. Start with "
                f"{ADAPTER}=folder in the environment."
            )
        return None
    asked = parse_request(extra, served)
    if asked.features and getattr(params, "n", 1) > 1:
        raise ValueError("fsrl_features goes with n=1: ask for one answer at a time.")
    return asked


def _steered_inputs(original: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        config = self.vllm_config.additional_config
        known = config.get(KEY) if isinstance(config, dict) else None
        try:
            asked = _read_request(params, None if known is None else Served(**known))
        except ValueError as error:
            # Of all errors, these are the ones that a server answers with status 400.
            raise VLLMValidationError(str(error)) from None
        if known is None or asked is None:
            return original(self, request_id, prompt, params, *args, **kwargs)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        request.cache_salt = asked.cache_salt(next(iter(known["adapters"])), request.cache_salt)
        if asked.features:
            # What is found in the cache is not computed, so nothing could be reported of it.
            request.sampling_params.skip_reading_prefix_cache = True
        return request

    return process_inputs
