"""Results of cells put together: mean and spread over seeds."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .table import Table

# "mean", "std" (None of one value) and "n".
Spread = dict[str, float | int | None]
Results = Mapping[str, Sequence[Mapping[str, Any]]]


def spread(values: Iterable[float]) -> Spread | None:
    """Return mean, sample standard deviation and number of values; None where there is none that is finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    std = statistics.stdev(finite) if len(finite) > 1 else None
    return {"mean": statistics.fmean(finite), "std": std, "n": len(finite)}


def show(value: Spread | None, digits: int = 1) -> str:
    """Return "mean ± std", "mean" alone where there is one value, and "-" where there is none."""
    if value is None:
        return "-"
    mean = f"{value['mean']:.{digits}f}"
    return mean if value["std"] is None else f"{mean} ± {value['std']:.{digits}f}"


def mean_curve(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of a learning curve that all seeds have, with the spread of "seconds", "AP" and "APs"."""
    # A training that ended during an evaluation goes on without it.
    points = [{point["iteration"]: point for point in cell["curve"]} for cell in cells]
    return [
        {
            "iteration": iteration,
            **{name: spread(p[iteration].get(name, math.nan) for p in points) for name in ("seconds", "AP", "APs")},
        }
        for iteration in sorted(set.intersection(*map(set, points)))
    ]


def at_time(curve: Sequence[Mapping[str, float]], seconds: float, name: str = "AP") -> float:
    """Return what the last evaluation within so many seconds of training found; 0 where there was none yet."""
    within = [point[name] for point in curve if point["seconds"] <= seconds]
    return within[-1] if within else 0.0


def equal_time(results: Results) -> float | None:
    """Return the time in which all trainings of the fastest variant, on average, had ended; None without any."""
    ends = [[cell["curve"][-1]["seconds"] for cell in cells] for cells in results.values() if cells]
    return max(min(ends, key=statistics.fmean)) if ends else None


def summarise_study(table: Table, name: str, results: Results, latency: Mapping[str, Any] | None) -> dict[str, Any]:
    """Put a study together.

    Args:
        results: variant -> results of its finished cells, one for each seed.
        latency: of :func:`measure_latency`; None where it was not measured.
    """
    study = table.studies[name]
    seconds = equal_time({variant: results[variant] for variant in study.variants})
    timed = {(row["variant"], row["test_queries"]): row for row in (latency or {}).get("rows", ())}
    return {
        "question": study.question,
        "equal_time": seconds,
        "machine": latency and latency["machine"],
        "trained_on": _places(cell for variant in study.variants for cell in results[variant]),
        "rows": [
            {
                "variant": variant,
                "label": table.variants[variant].label,
                **_summarise_variant(results[variant], seconds),
                "latency": timed.get((variant, 0)),
                "test_queries": _summarise_queries(table, variant, results[variant], timed),
            }
            for variant in study.variants
        ],
    }


def _places(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the machines on which cells were trained, with how many side by side; those that say so alone."""
    return sorted(
        {
            cell["machine"] + (f"; {cell['jobs']} trainings side by side" if cell["jobs"] > 1 else "")
            for cell in cells
            if "machine" in cell
        }
    )


def _summarise_variant(cells: Sequence[Mapping[str, Any]], seconds: float | None) -> dict[str, Any]:
    last = [cell["curve"][-1] for cell in cells]
    return {
        "seeds": len(cells),
        "AP": spread(point["AP"] for point in last),
        "APs": spread(point.get("APs", math.nan) for point in last),
        "seconds": spread(point["seconds"] for point in last),
        "AP at equal time": None if seconds is None else spread(at_time(cell["curve"], seconds) for cell in cells),
        "detections": spread(cell["detections"] for cell in cells),
        "duplicates": spread(cell["duplicates"] for cell in cells),
        "curve": mean_curve(cells) if cells else [],
    }


def _summarise_queries(
    table: Table, variant: str, cells: Sequence[Mapping[str, Any]], timed: Mapping[tuple[str, int], Mapping]
) -> dict[str, dict[str, Any]]:
    return {
        str(number): {
            "AP": spread(cell["test_queries"][str(number)]["AP"] for cell in cells),
            "APs": spread(cell["test_queries"][str(number)]["APs"] for cell in cells),
            "latency": timed.get((variant, number)),
        }
        for number in table.variants[variant].test_queries
    }
