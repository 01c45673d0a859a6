"""Writing files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


@contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """Open a neighbour of ``path`` for writing, which takes its place once it is complete and on the disk.

    Whenever the process or the machine stops, ``path`` is the old file or the new one, as a whole.
    """
    unfinished = f"{path}.tmp"
    try:
        with open(unfinished, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
        _flush_folder(os.path.dirname(path) or ".")
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def _flush_folder(folder: str) -> None:
    """Put the names in a folder on the disk; without that a crash of the machine can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
