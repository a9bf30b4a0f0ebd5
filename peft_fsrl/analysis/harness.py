"""lm-evaluation-harness on any model, and its own program with FSRL adapters.

The only file that imports ``lm_eval``; needs the ``eval`` extra. Source:
https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .records import TaskFigure


class Harness:
    """Tasks of the harness, found and run.

    Args:
        tasks: names of tasks or groups.
        include_path: folder with further tasks as YAML files. Where it has all of ``tasks``, the
            harness's own, which take long to list, are not looked at.

    Raises:
        ImportError: without the ``eval`` extra.
        FileNotFoundError: if there is no such folder.
        ValueError: for no task, or one that nobody knows.
    """

    def __init__(
        self, tasks: Sequence[str], include_path: str | os.PathLike[str] | None = None
    ) -> None:
        _require_lm_eval()
        from lm_eval.tasks import TaskManager

        if not tasks:
            raise ValueError("Expected at least one task, got none.")
        if include_path is not None and not os.path.isdir(include_path):
            raise FileNotFoundError(f"There is no folder {str(include_path)!r} to take tasks from.")
        folder = None if include_path is None else str(include_path)
        self._manager = TaskManager(include_path=folder, include_defaults=False)
        if not set(tasks) <= set(self._manager.all_tasks):
            self._manager = TaskManager(include_path=folder)
        known = self._manager.all_tasks
        for task in tasks:
            if task not in known:
                near = difflib.get_close_matches(task, known, 3)
                raise ValueError(
                    f"lm-evaluation-harness has no task {task!r}"
                    + (f"; did you mean {' or '.join(near)}?" if near else ".")
                    + " `lm-eval ls tasks` lists them; give a folder of your own as `include_path`."
                )
        self.tasks = tuple(tasks)

    def run(
        self,
        model: nn.Module,
        tokenizer: Any,
        task: str,
        *,
        batch_size: int = 8,
        limit: int | None = None,
        num_fewshot: int | None = None,
        apply_chat_template: bool = False,
    ) -> tuple[TaskFigure, ...]:
        """Run one task on a model as it is now.

        Args:
            model: a causal language model, with or without adapters.
            tokenizer: its tokenizer.
            task: one of ``tasks``.
            batch_size: requests per forward pass.
            limit: only the first so many documents of each task; None takes all.
            num_fewshot: examples shown before each; None takes the task's own number.
            apply_chat_template: put prompts into the tokenizer's chat template.

        Returns:
            Every metric of the task and, for a group, of the tasks in it.
        """
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        mode = model.training
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            results = simple_evaluate(
                model=wrapped,
                tasks=[task],
                task_manager=self._manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                log_samples=False,
            )
        finally:
            model.train(mode)
        return read_figures(results)


def read_figures(results: Mapping[str, Any]) -> tuple[TaskFigure, ...]:
    """The figures in what ``lm_eval.simple_evaluate`` returns."""
    figures = []
    for task, found in results["results"].items():
        n = results.get("n-samples", {}).get(task, {}).get("effective")
        better = results.get("higher_is_better", {}).get(task, {})
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = found.get(f"{metric}_stderr,{filtered}")
            figures.append(
                TaskFigure(
                    task=task,
                    metric=metric if filtered == "none" else key,
                    value=float(value),
                    stderr=None if stderr is None or isinstance(stderr, str) else float(stderr),
                    n=n,
                    higher_is_better=better.get(metric),
                )
            )
    return tuple(figures)


def harness_version() -> str:
    """Version of the harness that is installed."""
    from importlib.metadata import version

    return version("lm_eval")


def run_program(arguments: Sequence[str]) -> None:
    """The harness's own program, in a process in which PEFT knows FSRL.

    PEFT looks for no plugins: ``lm_eval --model hf --model_args pretrained=...,peft=...`` finds an
    adapter's method only where somebody has imported it, as importing this package does.

    Args:
        arguments: for ``lm_eval``.

    Raises:
        ImportError: without the ``eval`` extra.
    """
    _require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "This needs lm-evaluation-harness, which cannot be imported. Run: "
            "pip install peft-fsrl[eval]"
        ) from error
