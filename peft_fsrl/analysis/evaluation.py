"""An adapter beside its base model on standard benchmarks and held-out pairs."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_text_atomically
from ..records import Record
from .buckets import LengthBucket, score_by_length
from .content import digest_adapter, digest_base, digest_tokenizer
from .harness import Harness, TaskFigure, harness_version
from .preferences import PreferenceScores, score_preferences
from .session import Session
from .winrate import WinRate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskScores(Record):
    """A task, or a group of them, run on one model.

    Attributes:
        task: the name that was asked for.
        model: ``"base"`` or ``"trained"``.
        key: what the figures depend on, as JSON: settings, and SHA-256 of task, base and adapter.
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


def compare_preferences(
    session: Session, *, n_buckets: int = 4, dataset_name: str = "data"
) -> PreferenceComparison:
    """Accuracy and margin of base and trained model on the same pairs, by length.

    Raises:
        ValueError: for fewer than two pairs, or no bucket.
        ImportError: without the ``audit`` extra.
    """
    with session.base():
        base = score_preferences(session, "base model")
    trained = score_preferences(session, "trained model")
    buckets = score_by_length(base, trained, n_buckets=n_buckets)
    return PreferenceComparison(dataset_name, base, trained, buckets)


def run_tasks(
    session: Session,
    harness: Harness,
    out: str | Path,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> tuple[TaskScores, ...]:
    """Run every task on the base and the trained model; each result is saved when it is finished.

    A result in ``out`` is taken from there if all that it depends on is as it was: settings,
    harness, tokenizer, the task's documents, the base's tensors and the adapter's.

    Args:
        session: its model has an FSRL adapter; its data are not read.
        harness: has the tasks.
        out: folder of the results.
        overwrite: replace results of something else there.
        settings: for ``Harness.run``.

    Raises:
        ValueError: for a file there that is no result, or, without ``overwrite``, of another
            content.
    """
    tokenizer = digest_tokenizer(session.tokenizer)
    shared = {"harness": harness_version(), "tokenizer": tokenizer, **settings}
    shared["base"] = digest_base(session.model)
    models = {"base": shared, "trained": shared | {"adapter": digest_adapter(session.model)}}
    jobs = []
    for task in harness.tasks:
        content = harness.digest(task)
        for name, inputs in models.items():
            path = Path(out) / f"{task.replace('/', '_')}.{name}.json"
            key = json.dumps(inputs | {"task": content}, sort_keys=True)
            jobs.append((task, name, path, key, _finished(path, key, overwrite)))
    scores = []
    for task, name, path, key, found in jobs:
        if found is None:
            logger.info("%s on the %s model", task, name)
            with session.base() if name == "base" else nullcontext():
                figures = harness.run(
                    session.model,
                    session.tokenizer,
                    task,
                    batch_size=session.batch_size,
                    **settings,
                )
            found = TaskScores(task, name, key, figures)
            write_text_atomically(path, found.to_json())
        scores.append(found)
    return tuple(scores)


def _finished(path: Path, key: str, overwrite: bool) -> TaskScores | None:
    if not path.exists():
        return None
    try:
        found = TaskScores.from_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not an evaluation result: {error}") from error
    if found.key == key:
        return found
    if overwrite:
        return None
    was, now = json.loads(found.key), json.loads(key)
    changed = {
        name: (was.get(name), now.get(name))
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    }
    raise ValueError(
        f"{path} holds a result of other inputs; then and now: {changed}. Choose "
        "another --out, or give --overwrite."
    )
