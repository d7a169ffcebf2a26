"""Whether a checkpoint was written to its end, before a training goes on from it.

A training that is killed while it saves leaves a folder that looks like a checkpoint. transformers writes the trainer's state
last and takes what else is missing for something that was not saved: an optimizer that begins anew, say.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

_LAST_FILE = "trainer_state.json"


def check_checkpoint(resume_from: str | bool | None, output_dir: str | None) -> None:
    """Stop where ``resume_from``, as :meth:`Trainer.train` takes it, is a checkpoint that was not written to its end.

    Args:
        resume_from: a folder, or True for the newest one in `output_dir`. What is no folder is left to transformers.
        output_dir: where the training saves.

    Raises:
        ValueError: it is not whole; the message names the newest one that is.
    """
    if not resume_from or (resume_from is True and not (output_dir and Path(output_dir).is_dir())):
        return
    folder = get_last_checkpoint(output_dir) if resume_from is True else resume_from
    if folder is None or not Path(folder).is_dir() or (reason := why_not_whole(Path(folder))) is None:
        return
    whole = newest_whole_checkpoint(Path(folder).parent)
    remedy = (
        "no other checkpoint there is complete: start from the beginning" if whole is None else f"resume from {whole}"
    )
    raise ValueError(
        f"{folder} was not written to its end ({reason}), as when a training is killed while it saves: {remedy}"
    )


def why_not_whole(folder: Path) -> str | None:
    """Why a training cannot go on from ``folder``; None if it can."""
    state = folder / _LAST_FILE
    if not state.is_file():
        return f"{_LAST_FILE}, which is written last, is missing"
    try:
        TrainerState.load_from_json(str(state))
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError):
        return f"{_LAST_FILE}, which is written last, cannot be read"
    return None


def newest_whole_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the last step among those in ``run`` that were written to their end; None where there is none."""
    steps = {
        path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    }
    whole = [path for path, step in steps.items() if step.isdecimal() and why_not_whole(path) is None]
    return max(whole, key=lambda path: int(steps[path]), default=None)
