"""vLLM's schedulers, which hand out what was noted of a request when it ends."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from ..training.rollouts import KEY
from .reports import MOST_TOKENS, Notes, make_report
from .requests import Served, parse_request


class ReportingScheduler(Scheduler):
    """vLLM's own scheduler; a finished request that asked for it brings its features along."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Attach what was noted to the outputs of requests that end here."""
        noted: Notes = getattr(model_runner_output, KEY, {})
        for name, tokens in noted.items():
            if name in self.requests:
                # Kept where it ends with the request, also where that is aborted.
                kept = self.requests[name].__dict__.setdefault(KEY, [])
                kept.extend(tokens)
                del kept[:-MOST_TOKENS]
        asked = {n: r for n, r in self.requests.items() if KEY in r.__dict__}
        found = super().update_from_output(scheduler_output, model_runner_output)
        for outputs in found.values() if asked else ():
            for output in outputs.outputs:
                if output.finish_reason is not None and output.request_id in asked:
                    report = self._report(asked[output.request_id])
                    params = output.kv_transfer_params or {}
                    output.kv_transfer_params = {**params, KEY: report}
        return found

    def _report(self, request: Any) -> dict[str, Any]:
        served = Served(**self.vllm_config.additional_config[KEY])
        asked = parse_request(request.sampling_params.extra_args, served)
        # The last token was written, but not read again.
        return make_report(asked, request.__dict__[KEY], request.num_tokens - 1)


class ReportingAsyncScheduler(ReportingScheduler, AsyncScheduler):
    """The same for asynchronous scheduling."""
