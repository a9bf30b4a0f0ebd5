"""GRPO and RLOO whose rollouts come from vLLM: the adapter alone is sent, and the penalty holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make serving")

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.distributed import cleanup_dist_env_and_memory

from peft_fsrl.training.trainer import with_fsrl
from serving_helpers import prompts, save_adapter, save_model

pytestmark = pytest.mark.filterwarnings("ignore")

TRAINERS = ("GRPO", "RLOO")


def train(name: str, folder: Path, out: Path, **settings: Any) -> tuple[Any, list[list[int]]]:
    """Two steps; the trainer, and what it was told to reward, in order."""
    # Not at the top: TRL warns there of every vLLM that it does not know.
    import trl

    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    rollouts: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        rollouts.extend(list(ids) for ids in completion_ids)
        # Answers to one prompt are all alike where they are greedy, and no reason to learn.
        return [float(row % 2) for row in range(len(completion_ids))]

    args = config_class(
        str(out),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        beta=0.0,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **settings,
    )
    words = [" ".join(f"w{token}" for token in prompt) for prompt in prompts(8, longest=12)]
    trainer = with_fsrl(trainer_class)(
        model=model,
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": words}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    return trainer, rollouts


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
