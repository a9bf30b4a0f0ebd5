"""lm-evaluation-harness on any model.

The only file that imports ``lm_eval``; needs the ``eval`` extra. Source:
https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..extras import install_command
from ..records import Record
from .content import digest_json


@dataclass(frozen=True)
class TaskFigure(Record):
    """One metric of one task, as lm-evaluation-harness gives it.

    Attributes:
        task: name of the task, or of the group that it belongs to.
        metric: its name, with the harness's filter behind a comma where there is one.
        value: the figure.
        stderr: its standard error, where the harness knows one.
        n: number of documents, where the harness says it.
        higher_is_better: as the task says, if it does.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None
    higher_is_better: bool | None


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
            raise FileNotFoundError(
                f"Expected a folder of tasks at {str(include_path)!r}, found none."
            )
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

    def digest(self, task: str) -> str:
        """SHA-256 of what a task asks: its settings and all documents, few-shot examples too."""
        # The former name, before lm-evaluation-harness 0.4.10.
        load = getattr(self._manager, "load", None) or self._manager.load_task_or_group
        found = load([task])
        tasks = _leaves(found.get("tasks", found))
        return digest_json({name: _describe(each) for name, each in tasks})

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
            limit: only the first N documents of each task; None takes all.
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


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, each in tasks.items():
        if isinstance(each, Mapping):
            yield from _leaves(each)
        else:
            yield str(name), each


def _describe(task: Any) -> list[Any]:
    documents = [list(task.eval_docs)]
    for has, read in (
        (task.has_training_docs, task.training_docs),
        (task.has_validation_docs, task.validation_docs),
    ):
        if has() and task.config.num_fewshot != 0:
            documents.append(list(read()))
    return [task.dump_config(), documents]


def harness_version() -> str:
    """Version of the harness that is installed."""
    from importlib.metadata import version

    return version("lm_eval")


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "This needs lm-evaluation-harness, which cannot be imported. Run: "
            + install_command("eval")
        ) from error
