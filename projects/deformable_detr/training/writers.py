"""Where the numbers of a run go: the terminal, ``metrics.json``, TensorBoard, and where asked Weights & Biases."""

import importlib
import json
import os
from types import ModuleType
from typing import Any

from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter, get_event_storage
from detectron2.utils.file_io import PathManager

# Of Detectron2's writers.
_SMOOTHING_WINDOW = 20


def build_writers(
    output_dir: str, max_iter: int, period: int, *, wandb: dict[str, Any] | None = None
) -> list[EventWriter]:
    """Build the writers to the terminal, to ``metrics.json`` and to TensorBoard.

    They smooth over the iterations since the last line, at most over 20. With a period of 1 every line holds the
    plain values of its iteration.

    Args:
        wandb: arguments of ``wandb.init``, to write there as well.

    Raises:
        ModuleNotFoundError: if that is asked for and not installed.
    """
    window = min(period, _SMOOTHING_WINDOW)
    os.makedirs(output_dir, exist_ok=True)
    writers = [
        CommonMetricPrinter(max_iter),
        MetricsWriter(os.path.join(output_dir, "metrics.json"), window_size=window),
        TensorboardXWriter(output_dir, window_size=window),
    ]
    return writers if wandb is None else [*writers, WandbWriter(window_size=window, **wandb)]


def import_wandb(key: str) -> ModuleType:
    """Return the optional package.

    Raises:
        ModuleNotFoundError: if it is not installed; names the ``key`` that asks for it.
    """
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{key} needs the package wandb: pip install wandb") from error


class MetricsWriter(EventWriter):
    """Write one JSON object per line, as Detectron2's JSONWriter does, but also twice in an iteration.

    The second line has what has come since the first.

    Args:
        path: of the file, which is continued if it exists.
        window_size: iterations over which noisy values are smoothed.
    """

    def __init__(self, path: str, window_size: int) -> None:
        self._file = PathManager.open(path, "a")
        self._news = _News(window_size)

    def write(self) -> None:
        if lines := self._news.take():
            rows = [{"iteration": iteration, **lines[iteration]} for iteration in sorted(lines)]
            self._file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class WandbWriter(EventWriter):
    """Write to Weights & Biases; a process that goes on with a run is a run of its own there.

    Args:
        window_size: iterations over which noisy values are smoothed.
        options: of ``wandb.init``.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """

    def __init__(self, *, window_size: int, **options: Any) -> None:
        self._run = import_wandb("WandbWriter").init(**options)
        self._news = _News(window_size)

    def write(self) -> None:
        lines = self._news.take()
        for iteration in sorted(lines):
            self._run.log(lines[iteration], step=iteration)

    def close(self) -> None:
        self._run.finish()


class _News:
    """What a writer has not written yet."""

    def __init__(self, window_size: int) -> None:
        self._window_size = window_size
        self._written: dict[str, int] = {}

    def take(self) -> dict[int, dict[str, float]]:
        """Return iteration -> name -> value of what has come since the last call."""
        lines: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._written.get(name, -1):
                self._written[name] = iteration
                lines.setdefault(iteration, {})[name] = value
        return lines
