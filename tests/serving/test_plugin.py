"""What the plugin refuses of a config that vLLM's build for CPUs would not make."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from peft_fsrl.serving.plugin import steer_config


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"prefill_context_parallel_size": 2}, "found prefill_context_parallel_size=2"),
        ({"use_ubatching": True}, "leave enable_dbo and ubatch_size out"),
    ],
)
def test_what_splits_the_tokens_of_a_step_is_refused(found: dict[str, int], says: str) -> None:
    sizes = ("tensor", "pipeline", "prefill_context", "data")
    parallel = {f"{kind}_parallel_size": 1 for kind in sizes} | {"use_ubatching": False} | found
    with pytest.raises(ValueError, match=says):
        steer_config(SimpleNamespace(parallel_config=SimpleNamespace(**parallel)), "folder", None)
