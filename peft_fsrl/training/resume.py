"""Which checkpoints of a run can be resumed: those that were written to their end."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end.

    The trainer's state is the last file that is written, once every process has written its own.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def find_checkpoint(output_dir: str, wanted: str | bool) -> str:
    """The folder of a complete checkpoint to resume from.

    Args:
        output_dir: where the run keeps its checkpoints.
        wanted: a checkpoint's folder, or True for the last complete one of the run.

    Raises:
        ValueError: if there is none, or the one that was named is not complete.
    """
    if wanted is not True:
        if not is_complete(Path(str(wanted))):
            raise ValueError(
                f"Expected a checkpoint in {wanted}, found no readable {TRAINER_STATE_NAME}: the "
                "run ended while it was being written. Name an earlier one, or resume from `True` "
                "for the last that is complete."
            )
        return str(wanted)
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {p: p.name.removeprefix(prefix) for p in Path(output_dir).glob(f"{prefix}*")}
    complete = [path for path, step in steps.items() if step.isdigit() and is_complete(path)]
    if not complete:
        unfinished = sorted(path.name for path in steps)
        found = f"only unfinished ones ({', '.join(unfinished)})" if unfinished else "none"
        raise ValueError(
            f"Expected a complete checkpoint to resume from in {output_dir}, found {found}. Start "
            "the run again from its beginning."
        )
    return str(max(complete, key=lambda path: int(steps[path])))
