"""A tiny random model behind every door of the room, and files to look at."""

from collections.abc import Callable, Sequence
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
