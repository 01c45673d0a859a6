"""A new run in the output folder of an earlier one, whose state must not become its own."""

import logging
import os
import shutil

from ..checkpoint.reading import split_options
from .checkpointer import step_checkpoints
from .early_stopping import FILE as EARLY_STOPPING

logger = logging.getLogger(__name__)

# What a resumed run reads. The pointer comes first: once it is gone, nobody goes on from what else is there.
_STATE = ("last_checkpoint", EARLY_STOPPING, "model_best.pth", "model_final.pth")


def set_aside_earlier_run(output_dir: str, weights: str) -> None:
    """Move what a resumed run would take for its own out of the way, into ``earlier_run`` in the output folder.

    For the main process, before the first iteration and after the weights are loaded.

    Args:
        output_dir: OUTPUT_DIR of the run that begins.
        weights: from which it begins. Such a file keeps its name, under which the run may be started once more, and is
            in the other folder as well.
    """
    names = [*_STATE, *map(os.path.basename, step_checkpoints(output_dir).values())]
    names = [name for name in names if os.path.isfile(os.path.join(output_dir, name))]
    if not names:
        return
    folder = _new_folder(os.path.join(output_dir, "earlier_run"))
    start = os.path.realpath(split_options(weights)[0])
    for name in names:
        path = os.path.join(output_dir, name)
        move = _add_name if os.path.realpath(path) == start else os.rename
        move(path, os.path.join(folder, name))
    logger.warning(
        "This run begins at iteration 0 in the output folder of an earlier run, whose %s %s now in %s",
        ", ".join(names),
        "is" if len(names) == 1 else "are",
        folder,
    )


def _new_folder(path: str) -> str:
    """Create a folder of this name, or with ``_2``, ``_3``, ... where there is one."""
    number, free = 1, path
    while os.path.exists(free):
        number += 1
        free = f"{path}_{number}"
    os.mkdir(free)
    return free


def _add_name(path: str, other: str) -> None:
    """Give a file a second name; some file systems can only copy it."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copy2(path, other)
