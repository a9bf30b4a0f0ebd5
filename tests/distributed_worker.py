"""Short training runs on a tiny model, in one process or several, and what came of them.

The tests start it in processes of their own; as a script it is what ``accelerate launch`` starts:
``distributed_worker.py FOLDER JOBS.json``, or ``distributed_worker.py example OPTIONS`` for the
example script. Every job leaves ``FOLDER/<job>/outcome-<rank>.pt``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from helpers import DESCENT, SIMPO, fsrl_model, tiny_model, tiny_preferences, tiny_tokenizer
from peft_fsrl import FSRLLayer, with_fsrl

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CONFIGS = EXAMPLES / "accelerate_configs"
SETTINGS: dict[str, Any] = {
    # Adam and a clipped norm would hide a gradient's scale.
    **DESCENT,
    "max_steps": 4,
    "learning_rate": 0.02,
    "lr_scheduler_type": "linear",
    "remove_unused_columns": False,
}
CPO = {**SIMPO, "max_length": 64}
TRAINERS: dict[str, tuple[type[Trainer], type[TrainingArguments], dict[str, Any]]] = {
    "cpo": (CPOTrainer, CPOConfig, CPO),
    "trainer": (Trainer, TrainingArguments, {}),
    "sft": (SFTTrainer, SFTConfig, {"max_length": 64, "completion_only_loss": True}),
    "dpo": (DPOTrainer, DPOConfig, {"max_length": 64, "beta": 0.5}),
}


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        name: of its folder; a run that resumes another one has that one's name.
        trainer: a key of ``TRAINERS``.
        rows: number of training examples.
        repeated: how many of the first examples stand at the end once more.
        dtype: of model and adapter.
        sequential: take the examples in their order.
        resume: what is given to ``train(resume_from_checkpoint=...)``.
        stop: end the run after this step, as a user's interrupt would, though more were planned.
        dies: ``(rank, step, where)``: that process kills itself at that optimizer step, ``where``
            being ``"backward"``, or half of a file of the checkpoint, by its name.
        settings: of the trainer.
        adapter: of the adapter's config.
    """

    name: str
    trainer: str = "cpo"
    rows: int = 24
    repeated: int = 0
    dtype: str = "float64"
    sequential: bool = False
    resume: bool | str | None = None
    stop: int | None = None
    dies: tuple[int, int, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)


class _Dies(TrainerCallback):
    """Kills its process after the backward pass of a step, before the optimizer's."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class _Stops(TrainerCallback):
    """Ends the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def _die_writing(name: str, step: int) -> None:
    """Kill this process when half of the file ``checkpoint-<step>/<name>`` is written."""

    def broken(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            for argument in args:
                path = Path(argument) if isinstance(argument, str | os.PathLike) else Path()
                # An adapter is first written to a folder inside its own.
                if path.name == name and f"checkpoint-{step}" in path.parts:
                    os.truncate(path, path.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    import peft.peft_model

    peft.peft_model.safe_save_file = broken(peft.peft_model.safe_save_file)
    torch.save = broken(torch.save)
    TrainerState.save_to_json = broken(TrainerState.save_to_json)  # type: ignore[method-assign]


def labeled_rows(preferences: Dataset) -> Dataset:
    """Prompts and chosen answers as token ids, of unequal lengths."""
    tokenizer = tiny_tokenizer()
    rows = []
    for row in preferences:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["chosen"])["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad on the right to the longest row of this batch."""
    length = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    mask = [[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in rows]
    return {
        "input_ids": filled("input_ids", 0),
        "labels": filled("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def build(job: Job, folder: Path) -> Trainer:
    """The job's trainer, on the same tiny model and data in every process."""
    trainer_class, args_class, settings = TRAINERS[job.trainer]
    trainer_class = with_fsrl(trainer_class)
    if job.sequential:
        order = {"_get_train_sampler": lambda self, *_: SequentialSampler(self.train_dataset)}
        trainer_class = type(trainer_class.__name__, (trainer_class,), order)
    adapter = {"sae": str(folder.parent / "sae"), "l1_coeff": 0.3, **job.adapter}
    model = fsrl_model(tiny_model(), **adapter).to(getattr(torch, job.dtype))
    rows = tiny_preferences(job.rows)
    rows = concatenate_datasets([rows, rows.select(range(job.repeated))])
    if job.trainer == "trainer":
        rows = labeled_rows(rows)
    elif job.trainer == "sft":
        rows = rows.rename_column("chosen", "completion").remove_columns("rejected")
    args = args_class(
        str(folder), **{**SETTINGS, **settings, "per_device_train_batch_size": 2, **job.settings}
    )
    tools = {"data_collator": pad} if job.trainer == "trainer" else {}
    if job.trainer != "trainer":
        tools["processing_class"] = tiny_tokenizer()
    return trainer_class(model=model, args=args, train_dataset=rows, **tools)


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, gathered first if it is sharded."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, whole."""
    named = model.named_parameters()
    return {_short(name): whole(value) for name, value in named if value.requires_grad}


def _short(name: str) -> str:
    return name.rsplit("fsrl_adapter.default.", 1)[-1]


class Witness(TrainerCallback):
    """What passes by while a trainer trains.

    Attributes:
        widths: length of each batch in this process, padding included.
        broadcast: elements of each tensor that DDP broadcast.
        reduced: elements of each bucket of gradients that DDP reduced.
        resumed_at: the step that training began after.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.widths: list[int] = []
        self.broadcast: list[int] = []
        self.reduced: list[int] = []
        self.resumed_at = 0
        self._trainer = trainer
        self._send = dist._broadcast_coalesced

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resumed_at = state.global_step
        model = self._trainer.model_wrapped
        for module in model.modules():
            if isinstance(module, FSRLLayer):
                module.observers.append(lambda e: self.widths.append(e.steering_vector.shape[1]))
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.register_comm_hook(self, _reduce_and_count)
            dist._broadcast_coalesced = self._broadcast_and_count

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dist._broadcast_coalesced = self._send

    def _broadcast_and_count(self, group: Any, tensors: list[Tensor], *args: Any) -> None:
        self.broadcast += [tensor.numel() for tensor in tensors]
        self._send(group, tensors, *args)


# Without annotations: DDP wants them to be classes, here they would be strings.
def _reduce_and_count(witness, bucket):  # type: ignore[no-untyped-def]
    witness.reduced.append(bucket.buffer().numel())
    return allreduce_hook(None, bucket)


def run(job: Job, folder: Path, rank: int) -> None:
    """Train and write down what came of it."""
    torch.manual_seed(0)
    trainer = build(job, folder / job.name)
    if job.dies is not None and job.dies[0] == rank:
        _, step, where = job.dies
        if where == "backward":
            trainer.add_callback(_Dies(step))
        else:
            _die_writing(where, step)
    if job.stop is not None:
        trainer.add_callback(_Stops(job.stop))
    witness = Witness(trainer)
    trainer.add_callback(witness)
    start = parameters(trainer.model)
    trainer.train(resume_from_checkpoint=job.resume)
    trainer.save_model()
    state = trainer.accelerator.state
    module = trainer.accelerator.unwrap_model(trainer.model)
    steering = [each for each in module.modules() if isinstance(each, FSRLLayer)]
    sae_tensors = [t for s in steering for t in s.fsrl_sae["default"].module.state_dict().values()]
    outcome = {
        "processes": state.num_processes,
        "distributed_type": str(state.distributed_type.value),
        "wrapper": type(trainer.model_wrapped).__name__,
        "start": start,
        "parameters": parameters(trainer.model),
        "optimizer": optimizer_state(trainer),
        # Without the last row, a summary of the time since the run was started or resumed.
        "logs": [row for row in trainer.state.log_history if "train_runtime" not in row],
        "widths": witness.widths,
        "broadcast": witness.broadcast,
        "reduced": witness.reduced,
        "buffers": sum(buffer.numel() for buffer in module.buffers()),
        "sae_types": sorted({type(tensor).__name__ for tensor in sae_tensors}),
        "sae_sizes": sorted(tensor.numel() for tensor in sae_tensors),
        "trained": list(start),
        "sharded": [
            _short(name)
            for name, value in module.named_parameters()
            if value.requires_grad and isinstance(value, DTensor)
        ],
        "resumed_at": witness.resumed_at,
    }
    torch.save(outcome, folder / job.name / f"outcome-{rank}.pt")


def optimizer_state(trainer: Trainer) -> list[dict[str, Tensor]]:
    """The optimizer's tensors, whole, in the order of its parameters."""
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    groups = [p for group in inner.param_groups for p in group["params"]]
    return [
        {k: whole(v) for k, v in inner.state[p].items() if isinstance(v, Tensor)} for p in groups
    ]


def relabel_cpu_as_gpu() -> None:
    """Let accelerate take, on CPU and gloo, the paths that it keeps for GPUs: FSDP's among them."""
    start = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init  # type: ignore[method-assign]


def launcher_environment(config: str) -> dict[str, str]:
    """The variables that ``accelerate launch`` makes of a shipped FSDP config."""
    settings = yaml.safe_load((CONFIGS / config).read_text())["fsdp_config"]
    named = {name.upper(): str(value).lower() for name, value in settings.items()}
    named["FSDP_AUTO_WRAP_POLICY"] = named["FSDP_AUTO_WRAP_POLICY"].upper()
    named["FSDP_STATE_DICT_TYPE"] = named["FSDP_STATE_DICT_TYPE"].upper()
    return {**named, "ACCELERATE_USE_FSDP": "true"}


def main(
    rank: int, processes: int, folder: Path, store: Path, jobs: list[Job], fsdp_config: str | None
) -> None:
    """What one of ``processes`` processes does: all jobs, one after another."""
    torch.set_num_threads(1)
    if fsdp_config is not None:
        os.environ.update(launcher_environment(fsdp_config))
        relabel_cpu_as_gpu()
    if processes > 1:
        of_launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        of_launcher["LOCAL_WORLD_SIZE"] = processes
        os.environ.update({name: str(value) for name, value in of_launcher.items()})
        # A file for the first contact: no port that somebody else might take.
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=processes)
    for job in jobs:
        run(job, folder, rank)
    if dist.is_initialized():
        dist.destroy_process_group()


def write_jobs(path: Path, jobs: Iterable[Job]) -> None:
    """Jobs as the script reads them."""
    path.write_text(json.dumps([asdict(job) for job in jobs]))


def run_example(arguments: list[str]) -> None:
    """``examples/simpo.py`` in float64, which its command line does not offer."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    import simpo

    script, args, model, fsrl, job = simpo.parse(arguments)
    model.dtype = "float64"
    simpo.main(script, args, model, fsrl, job)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        relabel_cpu_as_gpu()
    if sys.argv[1] == "example":
        run_example(sys.argv[2:])
    else:
        for fields in json.loads(Path(sys.argv[2]).read_text()):
            run(Job(**fields), Path(sys.argv[1]), int(os.environ.get("RANK", "0")))
