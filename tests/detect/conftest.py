"""A tiny random model behind every door of the room, and files to look at."""

import functools
import http.server
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from deformable_detr.cli import run as run_command
from deformable_detr.detect.__main__ import main
from deformable_detr.loading import LoadedModel, load_model


@pytest.fixture
def tiny_model(tiny_yaml) -> LoadedModel:
    """Random weights: every score is near the prior of 0.01."""
    _, path, *opts = tiny_yaml("_two_stage")
    torch.manual_seed(0)
    return load_model(path, "", opts=opts)


@pytest.fixture
def detect(tiny_yaml, tmp_path) -> Callable[..., int]:
    """A function (inputs and flags) -> exit status of the command with a tiny random model; writes to ``out``."""
    _, path, *opts = tiny_yaml("_two_stage")

    def run(*arguments: str | Path) -> int:
        model = ["--model", path, "--weights", "", "--device", "cpu", "--output", str(tmp_path / "out")]
        return run_command(main, [*map(str, arguments[:1]), *model, *map(str, arguments[1:]), "--opts", *opts])

    return run


@pytest.fixture
def pixels() -> np.ndarray:
    """An image (40, 60, 3) that is another one when turned, mirrored, or of another channel order."""
    rows, columns = np.mgrid[0:40, 0:60].astype(np.uint8)
    return np.stack([rows * 6, columns * 4, np.full_like(rows, 30)], axis=2)


def write_video(path: Path, frames: Sequence[np.ndarray], *, codec: str = "mp4v", fps: float = 12.5) -> None:
    """Write RGB frames with OpenCV."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
    writer.release()


def gray(level: int) -> np.ndarray:
    """An image (48, 64, 3) of one gray."""
    return np.full((48, 64, 3), level, np.uint8)


@contextmanager
def serve(handler: Callable) -> Iterator[str]:
    """Answer requests on this machine; yields the address, without a slash at its end."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def serve_folder(folder: Path) -> AbstractContextManager[str]:
    """As :func:`serve`, with the files of a folder."""
    return serve(functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder)))


def guarded(handler: type, challenge: str) -> type:
    """A handler that answers those alone who come with the password "secret" of "me", as Basic or Digest has it."""

    class Guarded(handler):
        def do_GET(self) -> None:
            answer = self.headers.get("Authorization", "")
            # The first is "me:secret" in base64.
            if answer == "Basic bWU6c2VjcmV0" or ('username="me"' in answer and challenge.startswith("Digest")):
                super().do_GET()
                return
            self.send_response(401)
            self.send_header("WWW-Authenticate", challenge)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Guarded


class MjpegHandler(http.server.BaseHTTPRequestHandler):
    """Sends images as cameras in a network do: one JPEG after the other in one answer, which does not end by itself."""

    frames: Sequence[np.ndarray] = ()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for frame in self.frames:
            jpeg = cv2.imencode(".jpg", frame)[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            try:
                self.wfile.write(head.encode() + jpeg + b"\r\n")
            except OSError:  # Whoever looked at it went away.
                return
            time.sleep(0.01)


@pytest.fixture
def mjpeg_server() -> Iterator[Callable[[Sequence[np.ndarray]], str]]:
    """A function (images) -> address at which they are sent as a stream, without a suffix that would tell."""
    with ExitStack() as stack:

        def start(frames: Sequence[np.ndarray]) -> str:
            handler = type("Handler", (MjpegHandler,), {"frames": frames})
            return f"{stack.enter_context(serve(handler))}/video"

        yield start
