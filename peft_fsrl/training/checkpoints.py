"""Atomic saves of adapters, and complete checkpoints to resume from.

A process can be killed at any time. A save then has left the adapter that was there, or the new
one; a checkpoint has left a mark that it is complete, or is passed over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import move_file, write_text_atomically
from ..steering import adapter_configs
from ..tuner.compatibility import require_same_adapter
from ..tuner.config import FSRLConfig

COMPLETE = "COMPLETE"


@contextmanager
def replacing_adapter(folder: str | Path) -> Iterator[Path]:
    """A folder to save an adapter in, whose files then take the place of those in ``folder``.

    One after the other, and weights last. They hold the identity of what they steer: between the
    two moves, old weights under a new config that means something else are refused at loading.

    Args:
        folder: the adapter's folder, made where it does not exist.

    Raises:
        FloatingPointError: nan or inf in what was saved; ``folder`` stays as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="_unfinished_", dir=folder) as name:
        staging = Path(name)
        yield staging
        _require_finite(staging, folder)
        files = [path for path in staging.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.name == SAFETENSORS_WEIGHTS_NAME, path)):
            move_file(path, folder / path.relative_to(staging))


def _require_finite(saved: Path, folder: Path) -> None:
    bad = []
    for path in saved.rglob(SAFETENSORS_WEIGHTS_NAME):
        with safe_open(path, framework="pt") as file:
            # Of the extremes, for which no second tensor is needed.
            extremes = {name: file.get_tensor(name).aminmax() for name in file.keys()}  # noqa: SIM118
        bad += [n for n, both in extremes.items() if not all(map(_is_finite, both))]
    if bad:
        raise FloatingPointError(
            "The adapter was not saved: expected finite weights, found nan or inf in "
            f"{bad[:3]}{' and others' if len(bad) > 3 else ''}. Training diverged: resume from an "
            f"earlier checkpoint with a lower learning rate. {folder} is as it was before."
        )


def _is_finite(value: object) -> bool:
    return bool(value.isfinite())  # type: ignore[attr-defined]


def mark_complete(checkpoint: str | Path) -> None:
    """Mark a checkpoint as complete: every process has written its part."""
    write_text_atomically(Path(checkpoint, COMPLETE), "Every process has written its part.\n")


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, by step."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {p: p.name.removeprefix(prefix) for p in Path(output_dir).glob(f"{prefix}*")}
    complete = [path for path, step in steps.items() if step.isdigit() and _is_complete(path)]
    return sorted(complete, key=lambda path: int(steps[path]))


def find_checkpoint(output_dir: str | Path, wanted: str | Literal[True]) -> str:
    """The folder of a complete checkpoint to resume from.

    Args:
        output_dir: where the run keeps its checkpoints.
        wanted: a checkpoint's folder, or True for the last complete one of the run.

    Raises:
        ValueError: if there is none, or the one that was named is not complete.
    """
    if wanted is not True:
        if not _is_complete(Path(wanted)):
            raise ValueError(
                f"Expected a complete checkpoint in {wanted}, found no file {COMPLETE}: the run "
                "ended while the checkpoint was being written, or `with_fsrl` did not make the "
                "trainer. Name an earlier one, or resume from `True` for the last that is "
                "complete. If you know it is complete, create an empty file of that name there."
            )
        return str(wanted)
    complete = complete_checkpoints(output_dir)
    if not complete:
        names = sorted(path.name for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        found = f"only unfinished ones ({', '.join(names)})" if names else "none"
        raise ValueError(
            f"Expected a complete checkpoint to resume from in {output_dir}, found {found}. Start "
            "the run again from the beginning."
        )
    return str(complete[-1])


def require_same_run(model: nn.Module, checkpoint: str | Path) -> None:
    """Refuse a checkpoint whose adapters are others than the model's.

    Raises:
        ValueError: for another SAE, other features or anything else that decides what weights mean.
    """
    for name, config in adapter_configs(model).items():
        folders = [Path(checkpoint, name), Path(checkpoint)]
        found = next((each for each in folders if (each / CONFIG_NAME).is_file()), None)
        # Sharded checkpoints of FSDP have none.
        if found is not None:
            require_same_adapter(config, FSRLConfig.from_pretrained(str(found)), str(found))


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / COMPLETE).is_file()
