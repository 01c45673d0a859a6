"""What the command line is asked to look at: files, folders, addresses; and where each result goes."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from detectron2.utils.file_io import PathManager

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".pnm", ".ppm")
IMAGE_SUFFIXES += (".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# Pictures are written as JPEG where they came as such, and without loss where not.
_JPEG_SUFFIXES = (".jfif", ".jpe", ".jpeg", ".jpg")


class SourceError(OSError):
    """An input in which nothing can be looked at; the message names it."""


@dataclass(frozen=True)
class Source:
    """One image or video.

    Attributes:
        path: a file, or an address.
        name: relative to the folder that was given, or the file's own name; with "/" between folders.
        is_video: by its suffix.
    """

    path: str
    name: str
    is_video: bool


def find_sources(argument: str, *, output: Path) -> list[Source]:
    """All images and videos that one argument names, sorted; a folder is searched with all folders below it.

    Hidden files and folders are left out, and so is ``output`` where it lies within the folder: it holds the
    annotated pictures of the run before.

    Raises:
        SourceError: if a folder holds no image and no video, or cannot be listed.
    """
    if not os.path.isdir(argument):
        name = PurePosixPath(unquote(urlsplit(argument).path)).name if "://" in argument else os.path.basename(argument)
        return [Source(argument, name or "image", _suffix(name) in VIDEO_SUFFIXES)]
    found = []
    for folder, folders, files in os.walk(argument, onerror=_raise):
        folders[:] = sorted(f for f in folders if f[0] != "." and not _same(os.path.join(folder, f), output))
        for file in sorted(files):
            if file[0] != "." and _suffix(file) in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
                path = os.path.join(folder, file)
                name = os.path.relpath(path, argument).replace(os.sep, "/")
                found.append(Source(path, name, _suffix(file) in VIDEO_SUFFIXES))
    if not found:
        suffixes = " ".join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        raise SourceError(f"folder {argument} holds no image and no video; looked for {suffixes}")
    return found


def without_repetitions(sources: Sequence[Source]) -> list[Source]:
    """Leave out what was named before, be it by another path."""
    first: dict[str, Source] = {}
    for source in sources:
        first.setdefault(_identity(source.path), source)
    return list(first.values())


def name_outputs(sources: Sequence[Source], output: Path) -> list[Path]:
    """Return a file below ``output`` for each source, under its name; of equal names the later get ``_2``, ``_3``, ...

    Raises:
        SourceError: if one would be written over a source.
    """
    inputs = {_identity(source.path) for source in sources}
    taken, paths = set(), []
    for source in sources:
        relative = PurePosixPath(source.name)
        suffix = ".mp4" if source.is_video else relative.suffix if _suffix(source.name) in _JPEG_SUFFIXES else ".png"
        stem, count = relative.stem, 1
        # Compared as a file system does that knows no capitals.
        while (path := relative.with_name(f"{stem}{f'_{count}' * (count > 1)}{suffix}")).as_posix().casefold() in taken:
            count += 1
        taken.add(path.as_posix().casefold())
        paths.append(output / path)
        if _identity(str(paths[-1])) in inputs:
            raise SourceError(f"{paths[-1]} would be written over an input; choose another output folder")
    return paths


@contextmanager
def local_file(path: str | os.PathLike) -> Iterator[str]:
    """Yield a file on this machine for a path or address; what was downloaded is removed afterwards."""
    path = os.fspath(path)
    if "://" not in path:
        yield path
    elif path.startswith("file://"):
        yield url2pathname(urlsplit(path).path)
    else:
        # iopath's own cache knows an address by its path alone, without the host, and keeps it for ever.
        folder = tempfile.mkdtemp(prefix="deformable_detr_")
        try:
            yield PathManager.get_local_path(path, cache_dir=folder)
        finally:
            shutil.rmtree(folder)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _identity(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)


def _same(path: str, output: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(output)


def _raise(error: OSError) -> None:
    raise SourceError(f"cannot list folder {error.filename}: {error.strerror}") from error
