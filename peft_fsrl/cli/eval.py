"""``peft-fsrl eval``: an adapter beside its base model on standard benchmarks."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..analysis import compute_win_rate, sample_pairs, statistics
from ..analysis.evaluation import Evaluation, TaskScores, compare_preferences, run_tasks
from ..analysis.harness import Harness
from ..analysis.report import render_evaluation
from ..analysis.winrate import Asker
from ..files import require_folder, write_text_atomically
from ._inputs import (
    add_adapter_arguments,
    add_data_arguments,
    add_model_arguments,
    add_output_arguments,
    load_adapter,
    load_rows,
    open_session,
)
from .main import deliver

EXAMPLE = "peft-fsrl eval runs/organism --dataset organism --out runs/eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl eval``."""
    add_adapter_arguments(parser, labels=False)
    add = parser.add_argument_group("lm-evaluation-harness (extra eval)").add_argument
    add("--tasks", metavar="A,B", help="such as mmlu,gsm8k,truthfulqa_mc2")
    add("--include-path", metavar="FOLDER", help="folder of your own tasks, as YAML files")
    add("--limit", metavar="N", type=int, help="use the first N documents of each task")
    add("--num-fewshot", metavar="N", type=int, help="examples per prompt; default: the task's")
    text = "format prompts with the tokenizer's template"
    add("--apply-chat-template", action="store_true", help=text)
    add_data_arguments(parser, n_pairs=400, required=False)
    add = parser.add_argument_group("judged answers to their prompts (extra judge)").add_argument
    text = "an OpenAI-compatible endpoint, http://host:8000/v1"
    add("--judge-url", metavar="URL", help=text)
    add("--judge-model", metavar="NAME", help="the judge's name there")
    text = "answer the first N prompts (100)"
    add("--judge-prompts", metavar="N", type=int, default=100, help=text)
    text = "length limit of an answer (256)"
    add("--max-new-tokens", metavar="N", type=int, default=256, help=text)
    add_model_arguments(parser, simpo=True)
    group = add_output_arguments(parser, "eval.json and what each task said")
    text = "replace results that other settings gave"
    group.add_argument("--overwrite", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print; finished tasks of an earlier run are reused."""
    _check(args)
    tasks = [name.strip() for name in args.tasks.split(",")] if args.tasks else []
    harness = Harness(tasks, args.include_path) if tasks else None
    model, tokenizer, base_name = load_adapter(args.adapter, args)
    # Before anything takes hours.
    require_folder(args.out)
    rows, name = load_rows(args, tokenizer) if args.dataset else ([], "")
    session = open_session(model, tokenizer, rows, args)
    scores: tuple[TaskScores, ...] = ()
    if harness is not None:
        scores = run_tasks(
            session,
            harness,
            args.out / "tasks",
            overwrite=args.overwrite,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            apply_chat_template=args.apply_chat_template,
        )
    preferences = None
    if rows:
        preferences = compare_preferences(session, dataset_name=name)
    found = Evaluation(args.adapter, base_name, scores, preferences, None)
    if args.judge_url:
        # A judge may fail, and what is measured already is not its to lose.
        write_text_atomically(args.out / "eval.json", found.to_json())
        judge = make_judge(args.judge_url, args.judge_model, args.out / "judge.jsonl")
        prompts = [row["prompt"] for row in session.rows[: args.judge_prompts]]
        pairs = sample_pairs(session, prompts, max_new_tokens=args.max_new_tokens)
        win_rate = compute_win_rate(pairs, judge, judge_name=args.judge_model)
        found = replace(found, win_rate=win_rate)
    deliver(args, found, render_evaluation(found))
    return 0


def make_judge(url: str, name: str, cache: Path) -> Asker:
    """A judge at an endpoint, with a cache of its answers."""
    from ..analysis.labels import Judge

    return Judge(url, name, cache=cache, progress=True)


def _check(args: argparse.Namespace) -> None:
    if not (args.tasks or args.dataset):
        raise ValueError("Expected --tasks, --dataset, or both: there is nothing to evaluate.")
    if bool(args.judge_url) != bool(args.judge_model):
        raise ValueError("A judge needs both --judge-url and --judge-model.")
    if args.judge_url and not args.dataset:
        raise ValueError("A judge needs prompts: pass --dataset.")
    if args.dataset:
        statistics.require()
