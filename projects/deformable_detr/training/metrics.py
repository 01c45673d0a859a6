"""The ``metrics.json`` of a run, which Detectron2's JSONWriter writes."""

import json
import os


def read_metrics(output_dir: str) -> dict[int, dict[str, float]]:
    """The scalars of every iteration that was logged; with a log period of 1 those are all, unsmoothed.

    A line that was cut off by the end of its process is left out; of lines about the same iteration the later
    one counts.

    Returns:
        iteration -> name -> value.
    """
    metrics: dict[int, dict[str, float]] = {}
    with open(os.path.join(output_dir, "metrics.json"), "rb") as file:
        for line in file:
            if (row := _parse(line)) is not None:
                metrics.setdefault(row.pop("iteration"), {}).update(row)
    return metrics


def cut_metrics(output_dir: str, iteration: int) -> None:
    """Cut off what a resumed run will write again: the end after ``iteration``, and a line that was not finished.

    The file stays the same one, as a writer may have opened it.
    """
    path = os.path.join(output_dir, "metrics.json")
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        lines = file.readlines()
    while lines and ((row := _parse(lines[-1])) is None or row["iteration"] > iteration):
        lines.pop()
    os.truncate(path, sum(map(len, lines)))


def _parse(line: bytes) -> dict[str, float] | None:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except json.JSONDecodeError:
        return None
