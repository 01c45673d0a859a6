"""What the command line is asked to look at: files, folders, addresses, cameras; and where each result goes."""

import http.client
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit
from urllib.request import (
    HTTPBasicAuthHandler,
    HTTPDigestAuthHandler,
    HTTPPasswordMgrWithDefaultRealm,
    build_opener,
    url2pathname,
    urlopen,
)

from detectron2.utils.file_io import PathManager

from ..wording import ignoring_records

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".pnm", ".ppm")
IMAGE_SUFFIXES += (".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# What has no end of its own, unless a file of this name exists: a camera is named by its number.
SCREEN = "screen"
_STREAM_SCHEMES = ("mms", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")
_STREAM_SUFFIXES = (".m3u8", ".mjpeg", ".mjpg", ".mpd")
# What servers call streams whose address does not tell.
_STREAM_TYPES = ("application/dash+xml", "application/vnd.apple.mpegurl", "application/x-mpegurl")
_STREAM_TYPES += ("multipart/mixed", "multipart/x-mixed-replace")
_PATIENCE = 10  # s, for a server to tell the type
# "me:secret@" of http://me:secret@host/a.
_USER = re.compile(r"(?<=://)[^/?#]*@")
# Pictures are written as JPEG where they came as such, and without loss where not.
_JPEG_SUFFIXES = (".jfif", ".jpe", ".jpeg", ".jpg")


class SourceError(OSError):
    """An input in which nothing can be looked at; the message names it."""


@dataclass(frozen=True)
class Source:
    """One image or video, or a camera, stream or screen.

    Attributes:
        path: a file, an address, the number of a camera, or "screen".
        name: relative to the folder that was given, or the file's own name; with "/" between folders.
        is_video: by its suffix, or as it is live.
        is_live: a camera, a stream or the screen.
    """

    path: str
    name: str
    is_video: bool
    is_live: bool = False

    @property
    def title(self) -> str:
        """The path, or what is live, for people and for results; without the password that an address may carry."""
        return self.name if self.is_live and "://" not in self.path else without_password(self.path)


def find_sources(argument: str, *, output: Path) -> list[Source]:
    """All images and videos that one argument names, sorted; a folder is searched with all folders below it.

    Links to folders are followed, behind all other folders; each folder is searched once, whatever leads to it.

    Numbers are cameras and "screen" is the screen, unless there is a file or folder of that name. Of an address with
    neither the suffix of an image nor of a video its server is asked whether it is a stream.

    Hidden files and folders are left out, and so is ``output`` where it lies within the folder: it holds the
    annotated pictures of the run before.

    Raises:
        SourceError: if a folder holds no image and no video, or cannot be listed, or an address is none.
    """
    _check_address(argument)
    if live := _live_source(argument):
        return [live]
    if not os.path.isdir(argument):
        name = _address_name(argument) if "://" in argument else os.path.basename(argument)
        return [Source(argument, name or "image", _suffix(name) in VIDEO_SUFFIXES)]
    found = []
    for folder, files in _walk(argument, output):
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


def files_of(sources: Sequence[Source]) -> set[str]:
    """Return the files and addresses of sources; links are followed."""
    return {_identity(source.path) for source in sources}


def name_outputs(sources: Sequence[Source], output: Path) -> list[Path]:
    """Return a file below ``output`` for each source, under its name; of equal names the later get ``_2``, ``_3``, ...

    Raises:
        SourceError: if one would be written over a source.
    """
    inputs = files_of(sources)
    taken: set[str] = set()
    paths = []
    for source in sources:
        suffix = PurePosixPath(source.name).suffix if _suffix(source.name) in _JPEG_SUFFIXES else ".png"
        name = PurePosixPath(source.name).with_suffix(".mp4" if source.is_video else suffix)
        paths.append(output / distinct_name(name, taken))
        if _identity(str(paths[-1])) in inputs:
            raise SourceError(f"{paths[-1]} would be written over an input; choose another output folder")
    return paths


def distinct_name(path: PurePosixPath, taken: set[str]) -> PurePosixPath:
    """Return ``path`` or, where it is ``taken``, the first free of ``name_2``, ``name_3``, ...; and take it."""
    stem, count = path.stem, 1
    # Compared as a file system does that knows no capitals.
    while path.as_posix().casefold() in taken:
        count += 1
        path = path.with_name(f"{stem}_{count}{path.suffix}")
    taken.add(path.as_posix().casefold())
    return path


def without_password(address: str) -> str:
    """Return an address without the user and the password that it may carry, and anything else as it is."""
    return _USER.sub("", address)


@contextmanager
def local_file(path: str | os.PathLike) -> Iterator[str]:
    """Yield a file on this machine for a path or address; what was downloaded is removed afterwards.

    Raises:
        OSError: if an address cannot be fetched.
    """
    path = os.fspath(path)
    if "://" not in path:
        yield path
    elif path.startswith("file://"):
        yield url2pathname(urlsplit(path).path)
    else:
        # iopath's own cache knows an address by its path alone, without the host, and keeps it for ever.
        folder = tempfile.mkdtemp(prefix="deformable_detr_")
        try:
            yield _download(path, folder)
        finally:
            shutil.rmtree(folder)


def _walk(top: str, output: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder that is to be searched, with the names of its files."""
    seen, starts = set(), [top]
    # Links are appended on the way: what lies in the folder itself keeps its own path.
    for start in starts:
        for folder, folders, files in os.walk(start, onerror=_raise):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(f for f in folders if f[0] != "." and not _same(os.path.join(folder, f), output))
            starts += filter(os.path.islink, (os.path.join(folder, f) for f in folders))
            yield folder, files


def _live_source(argument: str) -> Source | None:
    """The camera, stream or screen that an argument names, if it names one."""
    if os.path.exists(argument):
        return None
    if argument.isdecimal():
        name = f"camera_{argument}"
    elif "://" in argument and _is_stream(argument):
        name = _address_name(argument) or urlsplit(argument).hostname or "stream"
    elif argument == SCREEN:
        name = SCREEN
    else:
        return None
    return Source(argument, name, is_video=True, is_live=True)


def _check_address(argument: str) -> None:
    try:
        urlsplit(argument if "://" in argument else "")
    except ValueError as error:
        raise SourceError(f"{without_password(argument)} is not an address: {error}") from error


def _is_stream(address: str) -> bool:
    scheme, suffix = urlsplit(address).scheme, _suffix(_address_name(address))
    if scheme not in ("http", "https"):
        return scheme in _STREAM_SCHEMES
    if suffix in IMAGE_SUFFIXES + VIDEO_SUFFIXES + _STREAM_SUFFIXES:
        return suffix in _STREAM_SUFFIXES
    try:
        with _open(address, timeout=_PATIENCE) as response:
            return response.headers.get_content_type() in _STREAM_TYPES
    except (OSError, ValueError, http.client.HTTPException):
        # An image, which cannot be read; reading it tells why.
        return False


def _download(address: str, folder: str) -> str:
    """Fetch an address into a folder; return the file."""
    try:
        if _USER.search(address) and urlsplit(address).scheme in ("http", "https"):
            # Which iopath's handler cannot take.
            file = os.path.join(folder, f"download{_suffix(_address_name(address))}")
            with _open(address) as response, open(file, "wb") as stream:
                shutil.copyfileobj(response, stream)
            return file
        # The error that follows says the same, without the password.
        with ignoring_records("iopath.common.download", "Failed to download"):
            return PathManager.get_local_path(address, cache_dir=folder)
    except OSError:
        raise
    # What else fetching an address lets out depends on its handler.
    except Exception as error:
        raise SourceError(str(error) or type(error).__name__) from error


def _open(address: str, **options: float) -> http.client.HTTPResponse:
    """Open an address under http; its user and password are for the server that asks for them, and no other."""
    user = _USER.search(address)
    if user is None:
        return urlopen(address, **options)
    name, _, password = user[0][:-1].partition(":")
    address = without_password(address)
    passwords = HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, urlsplit(address).netloc, unquote(name), unquote(password))
    opener = build_opener(HTTPBasicAuthHandler(passwords), HTTPDigestAuthHandler(passwords))
    return opener.open(address, **options)


def _address_name(address: str) -> str:
    return PurePosixPath(unquote(urlsplit(address).path)).name


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _identity(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)


def _same(path: str, output: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(output)


def _raise(error: OSError) -> None:
    raise SourceError(f"cannot list folder {error.filename}: {error.strerror}") from error
