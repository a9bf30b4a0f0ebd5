"""Training in several processes: equal to one process, resumable, and free of the SAE's weight.

All runs are on tiny models in float64, where different orders of summation leave 1e-15 and any
mistake leaves far more. Processes come from a fork server that has imported everything once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

import distributed_worker as worker
from distributed_worker import Job
from helpers import HOOK_NAME, fsrl_model, tiny_preferences, tiny_sae
from peft_fsrl import with_fsrl
from peft_fsrl.training import find_checkpoint
from peft_fsrl.training.checkpoints import COMPLETE, mark_complete

ROOT = Path(__file__).resolve().parents[2]
# Nothing else in the model has a tensor of the SAE's sizes.
D_SAE = 29
SAE_SIZES = [16, D_SAE, 16 * D_SAE, 16 * D_SAE]
ADAPTER_SIZE = 16 * D_SAE + D_SAE + D_SAE
LIMIT = 240.0
Launch = Callable[..., list[int]]
Outcome = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("distributed")
    tiny_sae(d_sae=D_SAE, metadata={"hook_name": HOOK_NAME}).save_model(place / "sae")
    return place


@pytest.fixture(scope="module")
def context() -> Any:
    """A fork server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_worker"])
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with patch.dict(os.environ, {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}):
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def launch(folder: Path, context: Any) -> Launch:
    """Start processes that run jobs together, wait for them, return their exit codes."""
    groups = 0

    def start(jobs: Iterable[Job], processes: int, fsdp_config: str | None = None) -> list[int]:
        nonlocal groups
        groups += 1
        store = folder / f"store-{groups}"
        group = [
            context.Process(
                target=worker.main, args=(rank, processes, folder, store, list(jobs), fsdp_config)
            )
            for rank in range(processes)
        ]
        try:
            for process in group:
                process.start()
            end = time.monotonic() + LIMIT
            while any(process.is_alive() for process in group) and time.monotonic() < end:
                # Whoever is left waits for a process that will not come.
                if any(process.exitcode for process in group):
                    end = min(end, time.monotonic() + 10)
                group[0].join(0.05)
                time.sleep(0.02)
        finally:
            for process in group:
                if process.is_alive():
                    process.kill()
                process.join()
        return [int(process.exitcode or 0) for process in group]

    return start


def outcome(folder: Path, job: str, rank: int = 0) -> Outcome:
    return torch.load(folder / job / f"outcome-{rank}.pt", weights_only=False)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


CHECKPOINTING = {"gradient_checkpointing": True}
REENTRANT = {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
# A penalty keeps thresholds up; without one some fall below zero, and act as zero there.
FALLING = {"l1_coeff": 0.0}
ALL_USED = {"ddp_find_unused_parameters": False}
CLIPPED = {"optim": "adamw_torch", "max_grad_norm": 0.5, "learning_rate": 0.05}
JOBS = [
    Job("simpo"),
    Job("adam and clipping", settings=CLIPPED),
    Job("thresholds fall", settings=CLIPPED, adapter=FALLING),
    Job("accumulation", settings={"gradient_accumulation_steps": 2}),
    Job("nothing unused", settings=ALL_USED),
    Job(
        "jumprelu",
        adapter={"activation": "jumprelu", "l0_coeff": 0.02, "jumprelu_bandwidth": 0.5},
    ),
    Job("compiled", adapter={"compile": True}),
    Job("target l0", adapter={"target_l0": 5.0}),
    Job("trainer", trainer="trainer"),
    Job("trainer, accumulation", trainer="trainer", settings={"gradient_accumulation_steps": 2}),
    Job("sft", trainer="sft"),
    Job("dpo", trainer="dpo"),
    # The last of five rows of batches lacks a row: accelerate takes the first row once more.
    Job("last batch", rows=11, sequential=True, settings={"max_steps": 3}),
    Job("token penalty", adapter={"penalty_reduction": "token"}),
    Job("float32", dtype="float32"),
    Job("checkpointing", settings=CHECKPOINTING),
    Job("reentrant checkpointing", settings=REENTRANT),
    Job("checkpointing, nothing unused", settings={**CHECKPOINTING, **ALL_USED}),
]
SHARDED = ["simpo", "thresholds fall", "adam and clipping", "trainer", "dpo"]
# Runs to be cut short: Adam has a state, and a checkpoint falls on every second step.
LONG = Job("whole", settings={**CLIPPED, "max_steps": 6, "save_strategy": "steps", "save_steps": 2})


def doubled(job: Job) -> Job:
    """The job with twice the batch, for one process."""
    rows = {"rows": 11, "repeated": 1} if job.name == "last batch" else {}
    settings = {**job.settings, "per_device_train_batch_size": 4}
    return replace(job, name=f"{job.name}, one process", settings=settings, **rows)


@pytest.fixture(scope="module")
def one(launch: Launch) -> Callable[[str], str]:
    """Every job in one process, with the doubled batch."""
    assert launch([*map(doubled, JOBS), doubled(LONG)], 1) == [0]
    return lambda name: f"{name}, one process"


@pytest.fixture(scope="module")
def two(launch: Launch) -> None:
    """Every job in two processes."""
    assert launch([*JOBS, LONG], 2) == [0, 0]


@pytest.mark.parametrize("name", [job.name for job in [*JOBS, LONG]])
def test_two_processes_equal_one(
    name: str, folder: Path, one: Callable[[str], str], two: None
) -> None:
    alone, *both = outcome(folder, one(name)), outcome(folder, name), outcome(folder, name, 1)
    assert (alone["processes"], alone["distributed_type"]) == (1, "NO")
    for each in both:
        assert (each["processes"], each["distributed_type"]) == (2, "MULTI_CPU")
        assert each["wrapper"] == "DistributedDataParallel"
        assert each["start"].keys() == alone["start"].keys()
        assert largest_difference(each["start"], alone["start"]) == 0
    if name == "thresholds fall":
        assert (alone["parameters"]["threshold"] < 0).any()
    for parameter, value in alone["parameters"].items():
        assert (value - alone["start"][parameter]).abs().max() > 1e-3, parameter
    assert largest_difference(both[0]["parameters"], both[1]["parameters"]) == 0
    difference = largest_difference(both[0]["parameters"], alone["parameters"])
    if name == "token penalty":
        # The mean of two processes' means is not the mean over their tokens together.
        assert difference > 1e-5
    else:
        assert difference < (1e-5 if name == "float32" else 1e-13)


def test_processes_pad_differently(folder: Path, two: None) -> None:
    assert outcome(folder, "simpo")["widths"] != outcome(folder, "simpo", 1)["widths"]


def test_ddp_sends_the_adapter_and_never_the_sae(folder: Path, two: None) -> None:
    for rank in (0, 1):
        found = outcome(folder, "simpo", rank)
        assert found["sae_sizes"] == SAE_SIZES
        # One reduction of the gradients per step; buffers are broadcast at every forward pass.
        assert found["reduced"] == [ADAPTER_SIZE] * 4
        assert sum(found["broadcast"]) == 4 * found["buffers"]
        assert not {16 * D_SAE, D_SAE} & set(found["broadcast"])


@pytest.fixture(scope="module")
def sharded(launch: Launch) -> None:
    """Some jobs in two processes under the shipped FSDP2 config."""
    jobs = [job for job in JOBS if job.name in SHARDED]
    assert launch(
        [replace(j, name=f"{j.name}, FSDP2") for j in [*jobs, LONG]], 2, "fsdp2.yaml"
    ) == [
        0,
        0,
    ]


@pytest.mark.parametrize("name", [*SHARDED, "whole"])
def test_fsdp2_equals_one_process(
    name: str, folder: Path, one: Callable[[str], str], sharded: None
) -> None:
    alone, *both = (
        outcome(folder, one(name)),
        outcome(folder, f"{name}, FSDP2"),
        outcome(folder, f"{name}, FSDP2", 1),
    )
    for each in both:
        assert (each["processes"], each["distributed_type"]) == (2, "FSDP")
        assert each["wrapper"].startswith("FSDP")
        assert each["sharded"] == each["trained"] == list(alone["parameters"])
        # Neither a shard of its own nor a part of anything that is sharded.
        assert each["sae_types"] == ["Tensor"]
        assert each["sae_sizes"] == SAE_SIZES
        assert largest_difference(each["parameters"], alone["parameters"]) < 1e-13


def only_adapter(state: dict[str, Tensor]) -> bool:
    names = {name.rsplit(".", 1)[-1] for name in state}
    sizes = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    inside = all(".fsrl_adapter." in name for name in state)
    return inside and names == {"weight", "bias", "threshold", "identity"} and sizes == ADAPTER_SIZE


@pytest.mark.parametrize("mode", ["one process", "", "FSDP2"])
def test_checkpoints_hold_the_adapter_alone(
    mode: str, folder: Path, one: Any, two: None, sharded: None
) -> None:
    checkpoint = folder / f"whole{mode and ', '}{mode}" / "checkpoint-4"
    assert only_adapter(load_file(checkpoint / "adapter_model.safetensors"))
    moments = torch.load(checkpoint / ("optimizer.bin" if mode == "FSDP2" else "optimizer.pt"))
    saved = [
        tensor.numel()
        for state in moments["state"].values()
        for tensor in state.values()
        if isinstance(tensor, Tensor) and tensor.dim() > 0
    ]
    assert sum(saved) == 2 * ADAPTER_SIZE
    if mode == "FSDP2":
        assert only_adapter(torch.load(checkpoint / "pytorch_model_fsdp.bin"))
    names = {path.name for path in checkpoint.rglob("*")}
    assert not {"sae", "sae_weights.safetensors", "model.safetensors"} & names


def assert_same_run(folder: Path, cut: str, whole: str, processes: int) -> None:
    """Bit for bit: parameters, optimizer state and everything that was logged."""
    for rank in range(processes):
        found, expected = outcome(folder, cut, rank), outcome(folder, whole, rank)
        if rank == 0:
            # The others take up the log that the first has saved.
            assert found["logs"] == expected["logs"]
            assert len(found["logs"]) == 6
        for name, value in expected["parameters"].items():
            assert torch.equal(found["parameters"][name], value), name
        assert len(found["optimizer"]) == len(expected["optimizer"]) == 3
        for state, other in zip(found["optimizer"], expected["optimizer"], strict=True):
            assert state.keys() == other.keys() >= {"exp_avg", "exp_avg_sq", "step"}
            assert all(torch.equal(state[key], other[key]) for key in other)


# How a run ends, and the step of the last checkpoint that can be resumed. What a killed save leaves
# file by file is tests/training/test_checkpoints.py's.
ENDS = {
    "between steps": (None, 4),
    "in a step": ((0, 6, "backward"), 4),
    "writing the adapter": ((0, 4, "adapter_model.safetensors"), 2),
    "writing the state": ((0, 4, "trainer_state.json"), 2),
    "before one process has written": ((1, 4, "rng_state_1.pth"), 2),
}


def cut_and_resume(
    folder: Path, launch: Launch, end: str, job: Job, processes: int, config: str | None = None
) -> None:
    dies, last = ENDS[end]
    job = replace(job, name=f"{job.name}, cut {end}")
    if dies is None:
        assert launch([replace(job, stop=4)], processes, config) == [0] * processes
    else:
        codes = launch([replace(job, dies=dies)], processes, config)
        assert codes[dies[0]] == -signal.SIGKILL
        assert 0 not in codes
    assert (folder / job.name / f"checkpoint-{last}" / COMPLETE).exists()
    if last == 2:
        assert (folder / job.name / "checkpoint-4").exists()
    (folder / job.name / "outcome-0.pt").unlink(missing_ok=True)
    assert launch([replace(job, resume=True)], processes, config) == [0] * processes
    assert outcome(folder, job.name)["resumed_at"] == last


@pytest.mark.parametrize("end", ["in a step", "writing the adapter", "writing the state"])
def test_a_run_that_was_cut_resumes_to_the_same_bits(
    end: str, folder: Path, launch: Launch, one: Callable[[str], str]
) -> None:
    cut_and_resume(folder, launch, end, doubled(LONG), 1)
    assert_same_run(folder, f"{one('whole')}, cut {end}", one("whole"), 1)


@pytest.mark.parametrize("end", ["between steps", "before one process has written"])
def test_two_processes_that_were_cut_resume_to_the_same_bits(
    end: str, folder: Path, launch: Launch, two: None
) -> None:
    cut_and_resume(folder, launch, end, LONG, 2)
    assert_same_run(folder, f"whole, cut {end}", "whole", 2)


def test_fsdp2_resumes_to_the_same_bits(folder: Path, launch: Launch, sharded: None) -> None:
    end, job = "in a step", replace(LONG, name="whole, FSDP2")
    cut_and_resume(folder, launch, end, job, 2, "fsdp2.yaml")
    assert_same_run(folder, f"whole, FSDP2, cut {end}", "whole, FSDP2", 2)


def test_a_checkpoint_that_was_not_finished_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"complete checkpoint to resume from in .*, found none"):
        find_checkpoint(tmp_path, True)
    half = tmp_path / "checkpoint-8"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 8}')
    with pytest.raises(ValueError, match=r"a complete checkpoint in .*checkpoint-8, found no file"):
        find_checkpoint(tmp_path, str(half))
    with pytest.raises(ValueError, match=r"found only unfinished ones \(checkpoint-8\)"):
        find_checkpoint(tmp_path, True)
    # Ten comes after two, and what only looks like a checkpoint is passed over.
    for step in ("2", "10", "10x"):
        (tmp_path / f"checkpoint-{step}").mkdir()
        mark_complete(tmp_path / f"checkpoint-{step}")
    assert find_checkpoint(tmp_path, True) == str(tmp_path / "checkpoint-10")


def test_processes_that_do_not_know_of_each_other_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> Trainer:
        return with_fsrl(Trainer)(model=fsrl_model(), args=args, train_dataset=rows)

    args = TrainingArguments(str(folder / "alone"), use_cpu=True, report_to="none")
    rows = worker.labeled_rows(tiny_preferences(2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    build()
    # The variable alone is not a launcher's doing; this one is.
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"Expected to train with the 2 processes.*use_cpu=True"):
        build()


def accelerate(config: str | None, *arguments: object, **variables: str) -> str:
    """``accelerate launch`` of the worker script; no process of it outlives the call."""
    how = ["--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    if config is not None:
        how = [f"--config_file={worker.CONFIGS / config}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, worker.__file__]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=2 * LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-5000:]
    return output


def logged(output_dir: Path) -> list[dict[str, float]]:
    """The figures that both a single process and each of several can log."""
    rows = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [
        {k: v for k, v in row.items() if k in {"loss", "eval_loss", "grad_norm"}} for row in rows
    ]


# Evaluation batches that both one process and two divide the held-out pairs into evenly.
DEFAULT_JOB = ("--max_steps", 20, "--logging_steps", 5, "--eval_steps", 10, "--summary_pairs", 20)
DEFAULT_JOB += ("--per_device_eval_batch_size", 25, "--train_pairs", 400, "--test_pairs", 100)
DEFAULT_JOB += ("--coherence_prompts", 2, "--save_strategy", "steps", "--save_steps", 5)
HALVED = ("--use_cpu", "true", "--per_device_train_batch_size", 8)


@pytest.fixture(scope="module")
def run_example(context: Any) -> Callable[..., None]:
    """The example in one process that nobody has launched."""

    def run(*arguments: object) -> None:
        process = context.Process(target=worker.run_example, args=([*map(str, arguments)],))
        process.start()
        process.join(LIMIT)
        assert process.exitcode == 0

    return run


@pytest.fixture(scope="module")
def default_job(folder: Path, run_example: Callable[..., None]) -> Path:
    """The output of a shortened default job in one process."""
    run_example(*DEFAULT_JOB, "--output_dir", folder / "default")
    return folder / "default"


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "fsdp2.yaml"])
def test_the_default_job_gives_the_same_figures_in_two_processes(
    config: str, folder: Path, default_job: Path
) -> None:
    out = folder / config
    printed = accelerate(config, "example", *DEFAULT_JOB, *HALVED, "--output_dir", out)
    expected = logged(default_job)
    assert [sorted(row) for row in expected].count(["eval_loss"]) == 2
    assert logged(out) == [pytest.approx(row, rel=1e-6) for row in expected]
    weights, same = (load_file(d / "adapter_model.safetensors") for d in (default_job, out))
    assert largest_difference(weights, same) < 1e-6
    if config == "cpu_ddp.yaml":
        text = (default_job / "summary.txt").read_text()
        assert (out / "summary.txt").read_text() == text
        assert text in printed
    else:
        assert "Each process holds a part of the model" in printed


@pytest.mark.slow
def test_the_example_resumes(
    folder: Path, default_job: Path, run_example: Callable[..., None]
) -> None:
    out = folder / "resumed"
    shutil.copytree(default_job, out)
    shutil.rmtree(out / "checkpoint-20")
    (out / "checkpoint-15" / COMPLETE).unlink()
    (out / "adapter_model.safetensors").unlink()
    run_example(*DEFAULT_JOB, "--output_dir", out, "--resume_from_checkpoint", "true")
    expected, found = (load_file(d / "adapter_model.safetensors") for d in (default_job, out))
    assert largest_difference(expected, found) == 0
    assert logged(out)[:-1] == logged(default_job)[:-1]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed (`DS_BUILD_OPS=0 pip install deepspeed`)",
)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process_and_resumes(stage: int, folder: Path) -> None:
    # A process of its own for each run: ZeRO-3 changes how the next model is made.
    job = replace(LONG, name=f"whole, ZeRO-{stage}", dtype="float32", adapter=FALLING)
    cut = replace(job, name=f"{job.name}, cut")
    alone = replace(doubled(job), name="whole, float32")
    for each in (alone, job, replace(cut, stop=4), replace(cut, resume=True)):
        worker.write_jobs(folder / "jobs.json", [each])
        config = None if each is alone else f"deepspeed_zero{stage}.yaml"
        accelerate(config, folder, folder / "jobs.json", DS_ACCELERATOR="cpu")
    expected = outcome(folder, alone.name)
    assert (expected["parameters"]["threshold"] < 0).any()
    for rank in (0, 1):
        found, resumed = outcome(folder, job.name, rank), outcome(folder, cut.name, rank)
        assert (found["processes"], found["distributed_type"]) == (2, "DEEPSPEED")
        assert largest_difference(found["parameters"], expected["parameters"]) < 1e-6
        assert found["sae_types"] == ["Tensor"]
        assert found["sae_sizes"] == SAE_SIZES
        assert resumed["resumed_at"] == 4
        assert largest_difference(found["parameters"], resumed["parameters"]) == 0
    assert outcome(folder, job.name)["logs"] == outcome(folder, cut.name)["logs"]
    checkpoint = folder / job.name / "checkpoint-4"
    assert only_adapter(load_file(checkpoint / "adapter_model.safetensors"))
