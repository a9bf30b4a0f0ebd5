"""``peft-fsrl eval``: an adapter beside its base model, on tests that other people wrote."""

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
from ._inputs import add_data_arguments, add_model_arguments, load_adapter, load_rows, open_session
from .main import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``peft-fsrl eval``."""
    add = parser.add_argument
    add("adapter", help="folder or Hub repository of a trained adapter")
    add("--out", "--output", type=Path, default=Path("evaluation"), help="folder for the results")
    add("--base-model", help="base model; default: the one the adapter names")
    add("--overwrite", action="store_true", help="replace results made with other settings")
    add_model_arguments(parser)

    harness = parser.add_argument_group("lm-evaluation-harness (extra `eval`)")
    harness.add_argument("--tasks", help="comma-separated: mmlu,gsm8k,truthfulqa_mc2")
    harness.add_argument("--include-path", help="folder of your own tasks, as YAML files")
    harness.add_argument("--limit", type=int, help="use the first N documents of each task")
    harness.add_argument("--num-fewshot", type=int, help="examples per prompt; default: the task's")
    harness.add_argument("--apply-chat-template", action="store_true")

    add_data_arguments(parser, n_pairs=400, required=False)
    pairs = parser.add_argument_group("held-out preference pairs (extra `audit`)")
    pairs.add_argument("--beta", type=float, default=10.0, help="SimPO's reward scale")
    pairs.add_argument("--gamma", type=float, default=5.0, help="SimPO's target margin")
    pairs.add_argument("--length-buckets", type=int, default=4)

    judge = parser.add_argument_group("win rate on the prompts of those pairs (extra `judge`)")
    judge.add_argument("--judge-url", help="an OpenAI-compatible endpoint, http://host:8000/v1")
    judge.add_argument("--judge-model", help="name of the judge's model there")
    judge.add_argument("--judge-prompts", type=int, default=100, help="answer the first N (100)")
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
        preferences = compare_preferences(session, n_buckets=args.length_buckets, dataset_name=name)
    found = Evaluation(args.adapter, base_name, scores, preferences, None)
    # A judge may fail, and what is measured already is not its to lose.
    text = write_evaluation(found, args.out)
    if args.judge_url:
        judge = make_judge(args.judge_url, args.judge_model, args.out / "judge.jsonl")
        prompts = [row["prompt"] for row in session.rows[: args.judge_prompts]]
        pairs = sample_pairs(session, prompts, max_new_tokens=args.max_new_tokens)
        win_rate = compute_win_rate(pairs, judge, judge_name=args.judge_model)
        text = write_evaluation(replace(found, win_rate=win_rate), args.out)
    say(text)
    return 0


def write_evaluation(found: Evaluation, out: Path) -> str:
    """Write an evaluation as JSON and as text; returns the text."""
    text = render_evaluation(found)
    write_text_atomically(out / "evaluation.json", found.to_json())
    write_text_atomically(out / "evaluation.txt", text)
    return text


def make_judge(url: str, name: str, cache: Path) -> Asker:
    """A judge at an endpoint; what it has answered once it is not asked again."""
    from ..analysis.labels import Judge

    return Judge(url, name, cache=cache, progress=True)


def _check(args: argparse.Namespace) -> None:
    if not (args.tasks or args.dataset):
        raise ValueError("Nothing to evaluate: pass --tasks, --dataset, or both.")
    if bool(args.judge_url) != bool(args.judge_model):
        raise ValueError("A judge needs both --judge-url and --judge-model.")
    if args.judge_url and not args.dataset:
        raise ValueError("A judge needs prompts: pass --dataset.")
    if args.dataset:
        statistics.require()
