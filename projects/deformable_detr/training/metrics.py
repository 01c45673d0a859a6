"""The ``metrics.json`` of a run: one JSON object per line, as Detectron2's JSONWriter writes them."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Iteration -> name -> value.
Metrics = dict[int, dict[str, float]]


def read_metrics(output_dir: str | Path) -> Metrics:
    """Read the scalars of every iteration that was logged, also while the run still writes to its file.

    A line that its process had no time to finish is left out with a warning. Where a run went back to a checkpoint,
    what had been written past that is dropped. A file without a line is no error: a run may just have begun. Whoever
    cannot go on without data says so.

    Args:
        output_dir: OUTPUT_DIR of the run.

    Returns:
        Iterations in ascending order; with a log period of 1 those are all, unsmoothed.

    Raises:
        FileNotFoundError: there is no ``metrics.json``.
        ValueError: a line is JSON, but no object with a whole number as its iteration.
    """
    path = os.path.join(output_dir, "metrics.json")
    metrics: Metrics = {}
    latest: dict[str, int] = {}
    for number, (_, row) in enumerate(_read_rows(path), start=1):
        if row is None:
            logger.warning("%s, line %d is not complete and is left out", path, number)
            continue
        iteration = row.pop("iteration")
        # Only a metric that repeats itself tells of a checkpoint: JSONWriter may put the line of an evaluation behind
        # that of later training steps.
        if any(latest.get(name, iteration) > iteration for name in row):
            metrics = {past: values for past, values in metrics.items() if past <= iteration}
            latest = {name: past for past in sorted(metrics) for name in metrics[past]}
        metrics.setdefault(iteration, {}).update(row)
        latest |= dict.fromkeys(row, iteration)
    return dict(sorted(metrics.items()))


def cut_metrics(output_dir: str | Path, iteration: int) -> None:
    """Take out what a resumed run will write again: all after ``iteration``, and lines that were not finished.

    The file stays the same one, as a writer may have opened it.

    Raises:
        ValueError: as :func:`read_metrics`.
    """
    path = os.path.join(output_dir, "metrics.json")
    if not os.path.isfile(path):
        return
    kept = [line for line, row in _read_rows(path) if row is not None and row["iteration"] <= iteration]
    with open(path, "r+b") as file:
        file.writelines(kept)
        file.truncate()


def series(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """Return the iterations at which a metric was written, and its values there."""
    points = [(iteration, row[name]) for iteration, row in metrics.items() if name in row]
    return [iteration for iteration, _ in points], [value for _, value in points]


def training_seconds(metrics: Metrics) -> float:
    """Time that all iterations took, those of interrupted calls included."""
    iterations, seconds = series(metrics, "time")
    return sum(s * (end - start) for start, end, s in zip([-1, *iterations], iterations, seconds, strict=False))


def _read_rows(path: str) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Lines and their contents; None where one is torn: without its end, or run into by that of a later process."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            # Bytes that are no text raise another ValueError than text that is no JSON.
            except ValueError:
                yield line, None
                continue
            if not isinstance(row, dict) or type(row.get("iteration")) is not int:
                place = f"{path}, line {number}"
                raise ValueError(f"{place} must be a JSON object with a whole number as iteration, got {line[:60]!r}")
            yield line, row if line.endswith(b"\n") else None
