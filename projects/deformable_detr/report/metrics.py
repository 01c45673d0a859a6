"""Metrics of a training run, from the ``metrics.json`` that Detectron2's ``JSONWriter`` writes."""

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

Metrics = dict[int, dict[str, float]]


def read_metrics(path: str | Path) -> Metrics:
    """Reads a ``metrics.json``, also while the run still writes to it.

    A resumed run goes back to its checkpoint: what the interrupted run had written past that point is
    dropped. A line cut short by an interruption is left out with a warning.

    Args:
        path: file with one JSON object per line, each with an ``iteration``.

    Returns:
        iteration -> name -> value, in ascending order of iterations.

    Raises:
        ValueError: the file has no complete line, or a line that is not of this format.
    """
    metrics: Metrics = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s, line %d is not complete and is left out", path, number)
            continue
        if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
            raise ValueError(f"{path}, line {number} must be a JSON object with an iteration, got {line[:60]!r}")
        iteration = row.pop("iteration")
        if metrics and iteration < next(reversed(metrics)):
            metrics = {past: values for past, values in metrics.items() if past < iteration}
        metrics.setdefault(iteration, {}).update(row)
    if not metrics:
        raise ValueError(f"{path} has no complete line of metrics yet")
    return metrics


def series(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """Returns the iterations at which a metric was written, and its values there."""
    points = [(iteration, row[name]) for iteration, row in metrics.items() if name in row]
    return [iteration for iteration, _ in points], [value for _, value in points]


def training_seconds(metrics: Metrics) -> float:
    """Returns the time that all iterations took, those of interrupted calls included."""
    timed = [(iteration, row["time"]) for iteration, row in metrics.items() if "time" in row]
    starts = [-1] + [iteration for iteration, _ in timed]
    return sum(seconds * (end - start) for start, (end, seconds) in zip(starts, timed, strict=False))
