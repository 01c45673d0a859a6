"""Cameras, streams and the screen, as RGB frames: the newest ones, as many as can be looked at."""

import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
from PIL import ImageGrab

from .inputs import SCREEN
from .video import NO_FRAME, VideoError, VideoReader, VideoWriter

_SCREEN_FPS = 10.0
_PATIENCE = 2.0  # s, for a frame that is being read when a source is left


class LiveReader:
    """The newest frame of a camera or stream, whenever one is asked for; those in between are left out.

    A thread of its own takes every frame out of OpenCV, which would hand out the oldest.

    Attributes:
        fps: frames per second of the source.
        num_frames: 0, as nobody knows.
    """

    num_frames = 0

    def __init__(self, video: VideoReader) -> None:
        self.fps = video.fps
        self._video = video
        self._newest: np.ndarray | None = None
        self._stopped = self._ended = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._keep_reading, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[np.ndarray]:
        """uint8 RGB (H, W, 3), until the source ends.

        Raises:
            VideoError: if not a single frame can be decoded.
        """
        count = 0
        while (frame := self._wait()) is not None:
            count += 1
            yield frame
        if count == 0:
            raise VideoError(NO_FRAME)

    def close(self) -> None:
        """Leave the source; one that hangs is left to itself."""
        self._stopped = True
        self._thread.join(_PATIENCE)

    def _wait(self) -> np.ndarray | None:
        with self._news:
            self._news.wait_for(lambda: self._newest is not None or self._ended)
            frame, self._newest = self._newest, None
        return frame

    def _keep_reading(self) -> None:
        try:
            while not self._stopped and (frame := self._video.read()) is not None:
                with self._news:
                    self._newest = frame
                    self._news.notify()
        finally:
            # Here, as OpenCV must not be stopped while it reads.
            self._video.close()
            with self._news:
                self._ended = True
                self._news.notify()


class ScreenReader:
    """Pictures of the screen, through Pillow: OpenCV's packages have no part that takes them.

    Attributes:
        fps: of the video that they are written to.
        num_frames: 0: there is no end.

    Raises:
        VideoError: if Pillow cannot take a picture here.
    """

    num_frames = 0
    fps = _SCREEN_FPS

    def __iter__(self) -> Iterator[np.ndarray]:
        """uint8 RGB (H, W, 3)."""
        while True:
            yield _grab_screen()

    def close(self) -> None:
        pass


class RealTimeWriter(VideoWriter):
    """Writes frames that come at any pace so that the video lasts as long as the recording.

    A frame is shown until the next one comes, and not at all if that comes at once.

    Args:
        inputs: as of :class:`VideoWriter`.
        clock: seconds, from any start.
    """

    def __init__(
        self, path: Path, fps: float, *, inputs: Collection[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(path, fps, inputs=inputs)
        self._clock = clock
        self._start: float | None = None
        self._last: np.ndarray | None = None
        self._written = 0

    def write(self, rgb: np.ndarray) -> None:
        """As :meth:`VideoWriter.write`."""
        now = self._clock()
        if self._start is None:
            self._start = now
        while self._last is not None and self._written < round((now - self._start) * self._fps):
            super().write(self._last)
            self._written += 1
        self._last = rgb

    def close(self) -> None:
        """As :meth:`VideoWriter.close`."""
        if self._last is not None:
            super().write(self._last)
        super().close()


# What frames come from; only a VideoReader gives all of them.
Video = VideoReader | LiveReader | ScreenReader


def open_live(path: str) -> Video:
    """Open a camera by its number, a stream by its address, or the screen.

    A recording that is only sent as a stream, and knows how long it is, is read frame by frame.

    Raises:
        VideoError: if it cannot be opened.
    """
    if path == SCREEN:
        return ScreenReader()
    video = VideoReader(int(path) if path.isdecimal() else path)
    is_recording = path.startswith("http") and video.num_frames > 0
    return video if is_recording else LiveReader(video)


def _grab_screen() -> np.ndarray:
    try:
        return np.asarray(ImageGrab.grab().convert("RGB"))
    except (OSError, subprocess.SubprocessError) as error:
        raise VideoError(
            f"no picture of it can be taken ({error}); on Linux that needs an X server, named by DISPLAY, or one of "
            "the programs gnome-screenshot, grim and spectacle"
        ) from error
