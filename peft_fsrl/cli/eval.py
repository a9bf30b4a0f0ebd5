"""``peft-fsrl eval``: an adapter beside its base model, on tests that other people wrote."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from ..analysis import (
    compute_win_rate,
    sample_pairs,
    score_by_length,
    score_preferences,
    statistics,
)
from ..analysis.harness import Harness, harness_version
from ..analysis.records import Evaluation, PreferenceComparison, TaskScores, WinRate
from ..analysis.report import render_buckets, render_tasks, render_win_rate
from ..analysis.winrate import Asker
from ..files import require_folder, write_text_atomically
from ..steering import scale_steering
from ._inputs import add_data_arguments, add_model_arguments, load_adapter, load_rows

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl eval``."""
    add = parser.add_argument
    add("adapter", help="folder or Hub repository of a trained adapter")
    add("--out", "--output", type=Path, default=Path("evaluation"), help="folder for the results")
    add("--base-model", help="base model; by default the one that the adapter names")
    add("--overwrite", action="store_true", help="replace results of other settings there")
    add_model_arguments(parser)

    harness = parser.add_argument_group("lm-evaluation-harness (extra `eval`)")
    harness.add_argument("--tasks", help="names, with commas between: mmlu,gsm8k,truthfulqa_mc2")
    harness.add_argument("--include-path", help="folder with tasks of your own as YAML files")
    harness.add_argument("--limit", type=int, help="only the first so many documents of each task")
    harness.add_argument("--num-fewshot", type=int, help="default: each task's own")
    harness.add_argument("--apply-chat-template", action="store_true")

    add_data_arguments(parser, n_pairs=400, required=False)
    pairs = parser.add_argument_group("held-out preference pairs (extra `audit`)")
    pairs.add_argument("--beta", type=float, default=10.0, help="SimPO's reward scale")
    pairs.add_argument("--gamma", type=float, default=5.0, help="and target margin")
    pairs.add_argument("--length-buckets", type=int, default=4)

    judge = parser.add_argument_group("win rate on the prompts of those pairs (extra `judge`)")
    judge.add_argument("--judge-url", help="an OpenAI-compatible endpoint, http://host:8000/v1")
    judge.add_argument("--judge-model", help="the judge's name there")
    judge.add_argument("--judge-prompts", type=int, default=100, help="only the first so many")
    judge.add_argument("--max-new-tokens", type=int, default=256, help="length limit of answers")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, write; what an earlier run has finished is not done again."""
    _check(args)
    tasks = [name.strip() for name in args.tasks.split(",")] if args.tasks else []
    harness = Harness(tasks, args.include_path) if tasks else None
    model, tokenizer, base_name = load_adapter(args.adapter, args)
    # Before anything takes hours.
    require_folder(args.out)
    rows, name = load_rows(args, tokenizer) if args.dataset else ([], "")
    scores = [] if harness is None else run_tasks(harness, model, tokenizer, base_name, args)
    preferences = compare_preferences(model, tokenizer, rows, name, args) if rows else None
    prompts = [row["prompt"] for row in rows]
    found = Evaluation(args.adapter, base_name, tuple(scores), preferences, None)
    # A judge may fail, and what is measured already is not its to lose.
    text = write_evaluation(found, args.out)
    if args.judge_url:
        win_rate = ask_judge(model, tokenizer, prompts, args)
        text = write_evaluation(replace(found, win_rate=win_rate), args.out)
    sys.stdout.write(text)
    return 0


def write_evaluation(found: Evaluation, out: Path) -> str:
    """Write an evaluation as JSON and as text; returns the text."""
    text = render(found)
    write_text_atomically(out / "evaluation.json", found.to_json())
    write_text_atomically(out / "evaluation.txt", text)
    return text


def run_tasks(
    harness: Harness, model: PeftModel, tokenizer: Any, base_name: str, args: argparse.Namespace
) -> list[TaskScores]:
    """Every task on the base model and on the trained one; each is written when it is finished."""
    settings: dict[str, Any] = {
        "limit": args.limit,
        "num_fewshot": args.num_fewshot,
        "apply_chat_template": args.apply_chat_template,
    }
    shared = {"base_model": base_name, "dtype": args.dtype, "harness": harness_version()} | settings
    keys = {"base": shared, "trained": shared | {"adapter": hash_adapter(model)}}
    places = {
        (task, name): args.out / "tasks" / f"{task.replace('/', '_')}.{name}.json"
        for task in harness.tasks
        for name in keys
    }
    done = {
        each: _finished(path, json.dumps(keys[each[1]], sort_keys=True), args.overwrite)
        for each, path in places.items()
    }
    scores = []
    for (task, name), path in places.items():
        found = done[task, name]
        if found is None:
            logger.info("%s on the %s model", task, name)
            with model.disable_adapter() if name == "base" else nullcontext():
                figures = harness.run(
                    model, tokenizer, task, batch_size=args.batch_size, **settings
                )
            found = TaskScores(task, name, json.dumps(keys[name], sort_keys=True), figures)
            write_text_atomically(path, found.to_json())
        scores.append(found)
    return scores


def hash_adapter(model: PeftModel) -> str:
    """SHA-256 over what makes the active adapter what it is: weights and settings, not places."""
    config = model.peft_config[model.active_adapter].to_dict()
    for name in ("base_model_name_or_path", "inference_mode", "revision", "sae", "peft_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(get_peft_model_state_dict(model).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def compare_preferences(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, str]],
    name: str,
    args: argparse.Namespace,
) -> PreferenceComparison:
    """Accuracy and margin of base and trained model on the same pairs, by length."""
    settings: dict[str, Any] = {
        "beta": args.beta,
        "gamma": args.gamma,
        "batch_size": args.batch_size,
    }
    with scale_steering(model, 0.0):
        base = score_preferences(model, rows, tokenizer, description="base model", **settings)
    trained = score_preferences(model, rows, tokenizer, description="trained model", **settings)
    buckets = score_by_length(base, trained, n_buckets=args.length_buckets)
    return PreferenceComparison(name, base, trained, buckets)


def ask_judge(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], args: argparse.Namespace
) -> WinRate:
    """Win rate of the trained model over its base; the judge's answers are kept in the output."""
    judge = make_judge(args.judge_url, args.judge_model, args.out / "judge.jsonl")
    pairs = sample_pairs(
        model,
        prompts[: args.judge_prompts],
        tokenizer,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    return compute_win_rate(pairs, judge, judge_name=args.judge_model)


def make_judge(url: str, name: str, cache: Path) -> Asker:
    """A judge at an endpoint; what it has answered once it is not asked again."""
    from ..analysis.labels import Judge

    return Judge(url, name, cache=cache, progress=True)


def render(found: Evaluation) -> str:
    """An evaluation for a terminal."""
    lines = [f"{found.adapter}, on {found.base_model}"]
    if found.tasks:
        lines += ["", "lm-evaluation-harness (± standard error)", render_tasks(found.tasks)]
    if found.preferences is not None:
        both = found.preferences
        lines += ["", f"{both.base.n} held-out pairs of {both.dataset} [95 % interval]"]
        for name, scores in (("base", both.base), ("trained", both.trained)):
            lines.append(
                f"{name:8} SimPO loss {scores.loss:.3f}, accuracy {scores.accuracy:.1%}, "
                f"margin {scores.margin:+.2f}"
            )
        lines += ["", render_buckets(both.buckets)]
    if found.win_rate is not None:
        lines += ["", render_win_rate(found.win_rate)]
    return "\n".join(lines) + "\n"


def _check(args: argparse.Namespace) -> None:
    if not (args.tasks or args.dataset):
        raise ValueError("Nothing to evaluate: give --tasks, --dataset, or both.")
    if bool(args.judge_url) != bool(args.judge_model):
        raise ValueError("A judge needs both --judge-url and --judge-model.")
    if args.judge_url and not args.dataset:
        raise ValueError("A judge needs prompts: give --dataset.")
    if args.dataset:
        statistics.require()


def _finished(path: Path, key: str, overwrite: bool) -> TaskScores | None:
    if not path.exists():
        return None
    try:
        found = TaskScores.from_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no result of `peft-fsrl eval`: {error}") from error
    if found.key == key:
        return found
    if overwrite:
        return None
    raise ValueError(
        f"{path} holds a result of other settings: {found.key}, now {key}. Choose another "
        "--out, or give --overwrite."
    )
