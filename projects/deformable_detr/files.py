"""Writing files that are whole or not there, and asking before the work whether they can be written."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# Hidden, so that nobody takes an unfinished file for a result; the suffix stays, by which libraries choose a format.
_UNFINISHED = ".unfinished-"


def show(path: str | os.PathLike) -> str:
    """Return a path as text that any terminal can print, also where its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextmanager
def replacing_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give the path of a file to write, which takes the place of ``path`` once it is complete and on the disk.

    Whenever the process or the machine stops, ``path`` is the old file or the new one, as a whole. What a link points
    to is replaced, not the link; a device or a pipe is written to as it is.

    Raises:
        OSError: naming ``path`` and the reason, where no file can be created there.
    """
    path = _target(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    unfinished = _create_neighbour(path)
    try:
        yield unfinished
        # Not every library that writes a file puts it on the disk.
        with unfinished.open("r+b") as stream:
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
        _flush_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """As :func:`replacing_file`, with the file opened for writing."""
    with replacing_file(path) as unfinished, unfinished.open("wb") as stream:
        yield stream


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file of UTF-8 text: all of it, or nothing."""
    with replacing(path) as stream:
        stream.write(text.encode("utf-8"))


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """Write a JSON file: all of it, or nothing. ``options`` are those of :func:`json.dumps`."""
    write_text(path, json.dumps(content, **options))


def check_writable(path: str | os.PathLike) -> None:
    """Make sure that a file can be written: better known before the work than after it.

    Raises:
        OSError: naming the file and the reason.
    """
    path = _target(path)
    if path.is_dir():
        raise IsADirectoryError(f"the output must be a file, {show(path)} is a folder")
    if not path.exists() or path.is_file():
        _create_neighbour(path).unlink()


def make_folder(path: str | os.PathLike) -> None:
    """Create a folder for results where it is missing, and try to write there.

    Raises:
        OSError: naming the folder and the reason.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"cannot write to output folder {show(path)}: {error.strerror or error}") from error


def _target(path: str | os.PathLike) -> Path:
    """Return what a path is to mean: the file behind a link, and otherwise itself, as it was given."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def _create_neighbour(path: Path) -> Path:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {show(path)}: there is no folder {show(path.parent)}")
    unfinished = path.with_name(_UNFINISHED + path.name)
    try:
        unfinished.touch()
    except OSError as error:
        raise OSError(f"cannot write {show(path)}: {error.strerror or error}") from error
    return unfinished


def _flush_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; without that a crash of the machine can undo a rename.

    Shared folders (CIFS, VirtualBox, WSL) refuse that and Windows opens no folder. The file is whole all the same.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
