"""Video files through OpenCV, as RGB frames."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import cv2
import numpy as np

# MPEG-4 part 2, which OpenCV's own packages write and most players show; where it is missing, motion JPEG, for which
# OpenCV needs no codec but its own.
CODECS = (("mp4v", ".mp4"), ("MJPG", ".avi"))
_DEFAULT_FPS = 25.0
NO_FRAME = "it opens, but not one frame of it can be decoded"


class VideoError(OSError):
    """A video that cannot be read or written; the message names file and codec."""


class VideoReader:
    """The frames of a video file, a stream or a camera, in order.

    Args:
        source: a path, the address of a stream, or the number of a camera.

    Attributes:
        fps: frames per second; 25 where the file does not say.
        num_frames: as the file says, or 0; some files are wrong.

    Raises:
        VideoError: if there is no such file or camera, or OpenCV cannot open it.
    """

    def __init__(self, source: str | int) -> None:
        if isinstance(source, str) and "://" not in source:
            _check_file(source)
        self._capture = cv2.VideoCapture(source)
        if not self._capture.isOpened():
            raise VideoError(_why_closed(source))
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else _DEFAULT_FPS
        self.num_frames = max(int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        """uint8 RGB (H, W, 3), upright as the file's rotation says.

        Raises:
            VideoError: if not a single frame can be decoded.
        """
        count = 0
        while (frame := self.read()) is not None:
            count += 1
            yield frame
        if count == 0:
            raise VideoError(NO_FRAME)

    def read(self) -> np.ndarray | None:
        """Return the next frame, or None at the end."""
        there, frame = self._capture.read()
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) if there else None

    def close(self) -> None:
        self._capture.release()


def _check_file(path: str) -> None:
    if not os.path.isfile(path):
        raise VideoError("there is no such file")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise VideoError("OpenCV opens only file names in UTF-8; rename it") from error


def _why_closed(source: str | int) -> str:
    if isinstance(source, int):
        return f"OpenCV opens no camera of this number; the first one is 0, and on Linux this is /dev/video{source}"
    if "://" in source:
        return "OpenCV opens no stream there: nothing answers, or it has no codec for what does"
    return "no codec of this OpenCV opens it"


class VideoWriter:
    """Writes RGB frames; the file is opened when the first of them tells the size.

    Of an odd number of rows or columns mp4v drops the last one.

    Args:
        inputs: real paths of files over which nothing may be written.

    Attributes:
        path: what is written: ``.mp4``, or ``.avi`` where OpenCV cannot write that.
        codec: of ``CODECS``; None before the first frame.
    """

    def __init__(self, path: Path, fps: float, *, inputs: Collection[str] = ()) -> None:
        self.path = path
        self._inputs = inputs
        self.codec: str | None = None
        self._fps = fps
        self._size: tuple[int, int] | None = None

    def write(self, rgb: np.ndarray) -> None:
        """Append a frame, uint8 (H, W, 3).

        Raises:
            VideoError: if no codec can write the file, it is an input, or a frame has another size than the first.
        """
        size = (rgb.shape[1], rgb.shape[0])
        if self._size is None:
            self._open(size)
        elif size != self._size:
            # OpenCV would leave the frame out and say nothing.
            raise VideoError(f"cannot write {self.path}: a frame is {size} pixels large, the first was {self._size}")
        self._writer.write(np.ascontiguousarray(rgb[:, :, ::-1]))

    def close(self) -> None:
        """Finish the file.

        Raises:
            VideoError: if nothing has reached the disk.
        """
        if self._size is None:
            return
        self._writer.release()
        if not os.path.isfile(self.path) or os.path.getsize(self.path) == 0:
            raise VideoError(f"cannot write {self.path} with codec {self.codec}: the file stayed empty")

    def _open(self, size: tuple[int, int]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for codec, suffix in CODECS:
            path = self.path.with_suffix(suffix)
            if os.path.realpath(path) in self._inputs:
                raise VideoError(f"{path} would be written over an input; choose another output folder")
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), self._fps, size)
            if writer.isOpened():
                self._writer, self.path, self.codec, self._size = writer, path, codec, size
                return
        tried = ", ".join(f"{codec} in {suffix}" for codec, suffix in CODECS)
        raise VideoError(f"cannot write {self.path}: this OpenCV writes none of the codecs {tried}")
