"""GRPO and RLOO whose rollouts come from vLLM: the adapter alone is sent, and the penalty holds."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make serving")

import torch
from vllm.distributed import cleanup_dist_env_and_memory

from serving_helpers import save_adapter, save_model, train

pytestmark = pytest.mark.filterwarnings("ignore")

TRAINERS = ("GRPO", "RLOO")


@pytest.mark.parametrize("name", TRAINERS)
def test_rollouts_of_a_colocated_engine_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", save_model(tmp_path / "model"), l1_coeff=3.0)
    expected, own = train(name, tmp_path, tmp_path / "a", generation_kwargs={"do_sample": False})
    engine = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 64,
        "generation_kwargs": {"temperature": 0},
    }
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with patch.dict(os.environ, env):
        found, rollouts = train(name, tmp_path, tmp_path / "b", **engine)
    del found.vllm_generation
    cleanup_dist_env_and_memory()
    assert rollouts == own
    # The second step's rollouts are of an adapter that the first step has changed.
    half = len(own) // 2
    assert own[:half] != own[half:]
    for (key, one), other in zip(
        expected.model.state_dict().items(), found.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=key, rtol=1e-4, atol=1e-5)
    penalties = [row["fsrl/penalty"] for row in found.state.log_history if "fsrl/penalty" in row]
    assert penalties[0] > 0
    logged = [row["fsrl/penalty"] for row in expected.state.log_history if "fsrl/penalty" in row]
    assert penalties == pytest.approx(logged, rel=1e-3)
