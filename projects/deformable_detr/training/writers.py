"""Where the numbers of a run go: the terminal, ``metrics.json`` and TensorBoard."""

import json
import os

from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter, get_event_storage
from detectron2.utils.file_io import PathManager

# Of Detectron2's writers.
_SMOOTHING_WINDOW = 20


def build_writers(output_dir: str, max_iter: int, period: int) -> list[EventWriter]:
    """Build the writers to the terminal, to ``metrics.json`` and to TensorBoard.

    They smooth over the iterations since the last line, at most over 20. With a period of 1 every line holds the
    plain values of its iteration.
    """
    window = min(period, _SMOOTHING_WINDOW)
    os.makedirs(output_dir, exist_ok=True)
    return [
        CommonMetricPrinter(max_iter),
        MetricsWriter(os.path.join(output_dir, "metrics.json"), window_size=window),
        TensorboardXWriter(output_dir, window_size=window),
    ]


class MetricsWriter(EventWriter):
    """Write one JSON object per line, as Detectron2's JSONWriter does, but also twice in an iteration.

    The second line has what has come since the first.

    Args:
        path: of the file, which is continued if it exists.
        window_size: iterations over which noisy values are smoothed.
    """

    def __init__(self, path: str, window_size: int) -> None:
        self._file = PathManager.open(path, "a")
        self._window_size = window_size
        self._written: dict[str, int] = {}

    def write(self) -> None:
        lines: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._written.get(name, -1):
                self._written[name] = iteration
                lines.setdefault(iteration, {"iteration": iteration})[name] = value
        if lines:
            self._file.writelines(json.dumps(lines[key], sort_keys=True) + "\n" for key in sorted(lines))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
