"""What other people's tests say about a model."""

from __future__ import annotations

from dataclasses import dataclass

from ...records import Record
from .preferences import LengthBucket, PreferenceScores, WinRate


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


@dataclass(frozen=True)
class TaskScores(Record):
    """A task, or a group of them, run on one model.

    Attributes:
        task: the name that was asked for.
        model: ``"base"`` or ``"trained"``.
        key: settings that the figures depend on, as JSON, the adapter's weights among them.
        figures: of the task, or of the group and all tasks in it.
    """

    task: str
    model: str
    key: str
    figures: tuple[TaskFigure, ...]


@dataclass(frozen=True)
class PreferenceComparison(Record):
    """How the base model and the trained one rank the same held-out pairs.

    Attributes:
        dataset: name of the data.
        base: scores of the base model.
        trained: scores with the adapter.
        buckets: both by length of the answers.
    """

    dataset: str
    base: PreferenceScores
    trained: PreferenceScores
    buckets: tuple[LengthBucket, ...]


@dataclass(frozen=True)
class Evaluation(Record):
    """An adapter beside its base model.

    Attributes:
        adapter: name or path.
        base_model: name or path.
        tasks: base and trained, task by task.
        preferences: on held-out pairs, if there were any.
        win_rate: through a judge, if there was one.
    """

    adapter: str
    base_model: str
    tasks: tuple[TaskScores, ...]
    preferences: PreferenceComparison | None
    win_rate: WinRate | None
