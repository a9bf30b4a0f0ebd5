"""Train an FSRL adapter with SimPO, save it, and say what it learned.

With no flags, the offline default: the model organism that ships with the package.

    accelerate launch examples/simpo.py

The paper's runs (GPUs and the Hub):

    accelerate launch examples/simpo.py --config examples/configs/gemma2_2b_ultrafeedback.yaml
    accelerate launch examples/simpo.py --config examples/configs/gemma2_9b_ultrafeedback.yaml

Options come from TRL's ``ScriptArguments``, ``SimPOConfig`` and ``ModelConfig``, and from
``FSRLConfig``, on the command line, in a YAML file given with ``--config``, or both.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from peft_fsrl import load_sae, organism, with_fsrl
from peft_fsrl.analysis import Session, compute_summary, render_summary, statistics
from peft_fsrl.training import (
    CoherenceCallback,
    FSRLArguments,
    MuonAdamW,
    SimPOConfig,
    SimPOTrainer,
    prepare_preferences,
    prompt_texts,
)

ORGANISM = "organism"
OPTIMIZERS = ("trainer", "muon")
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "organism.yaml"


@dataclass
class JobArguments:
    """What belongs to this script alone."""

    overwrite_output: bool = field(
        default=False, metadata={"help": "Train into an output directory that holds another run."}
    )
    summary_pairs: int = field(
        default=400, metadata={"help": "Held-out pairs for the summary at the end; 0 for none."}
    )
    coherence_prompts: int = field(
        default=16, metadata={"help": "Held-out prompts to answer at every evaluation; 0 for none."}
    )
    unusable_rows: str = field(
        default="error",
        metadata={"help": "Rows that cannot be trained on: 'error' stops at them, 'drop' counts."},
    )
    shorten_prompts: bool = field(
        default=False, metadata={"help": "Shorten prompts where max_length would cut an answer."}
    )
    optimizer: str = field(
        default="trainer",
        metadata={"help": "'muon': Muon for matrices, AdamW for the rest; else as `--optim` says."},
    )
    exclude_random: int = field(
        default=0, metadata={"help": "Exclude so many features, drawn by the seed, from steering."}
    )
    style: float = field(
        default=0.9, metadata={"help": "Organism: how often the chosen answer has the liked style."}
    )
    honesty: float = field(
        default=0.55, metadata={"help": "Organism: how often the chosen answer is the honest one."}
    )
    train_pairs: int = field(default=4000, metadata={"help": "Organism: training pairs."})
    test_pairs: int = field(default=400, metadata={"help": "Organism: held-out pairs."})


def checkpoint_to_resume(args: Any) -> str | bool | None:
    """The folder that was given, True for the run's last checkpoint, None to start afresh."""
    given = str(args.resume_from_checkpoint).lower()
    return {"true": True, "false": None, "none": None}.get(given, args.resume_from_checkpoint)


def check_output_directory(args: Any, overwrite: bool) -> None:
    """Refuse a directory that holds another run, unless told to continue or to replace it."""
    directory = Path(args.output_dir)
    if checkpoint_to_resume(args) or overwrite or not directory.is_dir():
        return
    found = sorted(path.name for path in directory.iterdir())
    if found:
        raise FileExistsError(
            f"Expected an empty output directory, found another run in {directory} "
            f"({', '.join(found[:4])}). Choose another `--output_dir`, continue that run with "
            "`--resume_from_checkpoint true`, or give `--overwrite_output true`."
        )


def load_preferences(script: ScriptArguments, job: JobArguments, seed: int) -> DatasetDict:
    """The organism's pairs, or a data set in any of TRL's preference formats."""
    if script.dataset_name == ORGANISM:
        knobs = {"style": job.style, "honesty": job.honesty}
        return DatasetDict(
            {
                script.dataset_train_split: organism.preferences(
                    job.train_pairs, seed=f"train-{seed}", **knobs
                ),
                script.dataset_test_split: organism.preferences(
                    job.test_pairs, seed=f"test-{seed}", **knobs
                ),
            }
        )
    return load_dataset(
        script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming
    )


def prepare(dataset: Any, tokenizer: Any, args: SimPOConfig, job: JobArguments) -> Any:
    """A split, checked against what the trainer will do with it."""
    return prepare_preferences(
        dataset,
        tokenizer,
        # What the trainer takes where none is given.
        max_length=512 if args.max_length is None else args.max_length,
        unusable=job.unusable_rows,
        shorten_prompts=job.shorten_prompts,
        num_proc=args.dataset_num_proc,
    ).dataset


def final_figures(trainer: SimPOTrainer) -> dict[str, float]:
    """What the last evaluation found, made now unless the run ended with one."""
    step = trainer.state.global_step
    rows = [row for row in trainer.state.log_history if row["step"] == step]
    figures = {key: value for row in rows for key, value in row.items() if key.startswith("eval_")}
    return figures if "eval_loss" in figures else trainer.evaluate()


def is_sharded(trainer: SimPOTrainer) -> bool:
    """Whether no process has the whole model, as under FSDP and ZeRO-3."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def main(
    script: ScriptArguments,
    args: Any,
    model_args: ModelConfig,
    fsrl: Any,
    job: JobArguments,
) -> None:
    """Train, save, summarize."""
    check_output_directory(args, job.overwrite_output)
    if job.optimizer not in OPTIMIZERS:
        raise ValueError(f"Expected --optimizer to be one of {OPTIMIZERS}, got {job.optimizer!r}.")
    dataset = load_preferences(script, job, args.seed)
    labels: dict[int, str] | None = None
    categories: dict[str, list[int]] | None = None
    name = model_args.model_name_or_path
    if name == ORGANISM:
        creature = organism.load()
        name = str(creature.model_path)
        if fsrl.sae is None:
            fsrl.sae = str(creature.sae_path)
            fsrl.layer = creature.layer if fsrl.layer is None else fsrl.layer
            labels = {each.index: each.label for each in creature.feature_labels if each.label}
            categories = {name: creature.features(name) for name in ("style", "honesty")}
            if job.summary_pairs:
                # What the summary needs must not turn out to be missing after the training.
                statistics.require()

    if job.exclude_random:
        d_sae = load_sae(fsrl.sae).info.d_sae
        drawn = random.Random(args.seed).sample(range(d_sae), job.exclude_random)
        fsrl.exclude_features = sorted({*drawn, *(fsrl.exclude_features or ())})

    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(model_args),
    )
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.model_revision)
    has_test = script.dataset_test_split in dataset
    splits = [script.dataset_train_split, *([script.dataset_test_split] if has_test else [])]
    dataset = {split: prepare(dataset[split], tokenizer, args, job) for split in splits}
    if script.dataset_streaming:
        # accelerate would try to join texts of several batches into tensors.
        args.accelerator_config.dispatch_batches = False
    trainer = with_fsrl(SimPOTrainer)(
        model=model,
        args=args,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if has_test else None,
        processing_class=tokenizer,
        peft_config=fsrl.to_config(),
    )
    if job.optimizer == "muon":
        betas = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        trainer.optimizer_cls_and_kwargs = (MuonAdamW, {"lr": args.learning_rate, **betas})
    if has_test and job.coherence_prompts:
        prompts = prompt_texts(dataset[script.dataset_test_split], tokenizer, job.coherence_prompts)
        trainer.add_callback(CoherenceCallback(trainer, prompts))
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    trainer.save_model()
    trainer.save_state()

    figures = final_figures(trainer) if has_test else {}
    is_first = trainer.is_world_process_zero()
    if is_first and is_sharded(trainer):
        print("Each process holds a part of the model: load the adapter elsewhere to score it.")
    elif has_test and job.summary_pairs and is_first:
        held_out = Dataset.from_list(list(islice(trainer.eval_dataset, job.summary_pairs)))
        summary = compute_summary(
            Session(
                trainer.accelerator.unwrap_model(trainer.model),
                tokenizer,
                held_out,
                beta=args.beta,
                gamma=args.simpo_gamma,
                batch_size=args.per_device_eval_batch_size,
            ),
            labels=labels,
            categories=categories,
            # At this one the organism's base model begins plainly: a change of style shows.
            generation_seed=7,
        )
        text = render_summary(summary)
        Path(args.output_dir, "summary.json").write_text(summary.to_json())
        Path(args.output_dir, "summary.txt").write_text(text)
        print(text)
        print(f"The adapter, its model card and this summary are in {args.output_dir}")
    # Last, so that whoever finds it knows that the run is complete.
    trainer.save_metrics("eval", figures)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def parse(arguments: list[str]) -> tuple[Any, ...]:
    """Options as dataclasses; without a model or a config file, those of the offline default."""
    given = {argument.partition("=")[0] for argument in arguments}
    if not given & {"--config", "--model_name_or_path"}:
        arguments = ["--config", str(DEFAULT_CONFIG), *arguments]
    parser = TrlParser((ScriptArguments, SimPOConfig, ModelConfig, FSRLArguments, JobArguments))
    return parser.parse_args_and_config(arguments, fail_with_unknown_args=True)


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
