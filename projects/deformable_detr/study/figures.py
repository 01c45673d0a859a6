"""The drawings of the study: matplotlib figures of one pair of axes each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..report.figures import new_figure


def _figure(**labels: Any) -> tuple[Figure, Axes]:
    figure, axes = new_figure()
    axes.grid(alpha=0.3)
    axes.set(**labels)
    return figure, axes


def _line(axes: Axes, x: Sequence[float], spreads: Sequence[Mapping[str, float]], label: str) -> None:
    """Draw means, and a band of one standard deviation to both sides of them."""
    means = np.array([value["mean"] for value in spreads])
    (line,) = axes.plot(x, means, marker=".", linewidth=1.3, label=label)
    half = np.array([value["std"] or 0.0 for value in spreads])
    axes.fill_between(x, means - half, means + half, color=line.get_color(), alpha=0.15, linewidth=0)


def _finish(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")


def learning_curves(rows: Sequence[Mapping[str, Any]], metric: str, *, over: str) -> Figure:
    """Draw "AP" or "APs" of every row over "iteration" or over "seconds" of training."""
    unit = {"iteration": "iteration", "seconds": "seconds of training"}[over]
    figure, axes = _figure(xlabel=unit, ylabel=f"{metric} (%)")
    for row in rows:
        points = [point for point in row["curve"] if point[metric] is not None]
        x = [point[over] if over == "iteration" else point[over]["mean"] for point in points]
        if points:
            _line(axes, x, [point[metric] for point in points], row["label"])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    _finish(axes)
    return figure


def queries(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw AP over the number of queries at inference, one line for each number in training."""
    figure, axes = _figure(xlabel="queries at inference", ylabel="AP (%)", xscale="log")
    for row in rows:
        known = {int(number): entry["AP"] for number, entry in row["test_queries"].items() if entry["AP"]}
        if known:
            _line(axes, list(known), list(known.values()), row["label"])
            axes.set_xticks(list(known), [str(number) for number in known])
            axes.minorticks_off()
    _finish(axes)
    return figure


def latencies(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw AP over latency, one point for each row."""
    figure, axes = _figure(xlabel="ms an image", ylabel="AP (%)")
    for row in rows:
        if row["AP"] and row["latency"]:
            axes.errorbar(
                row["latency"]["ms"], row["AP"]["mean"], yerr=row["AP"]["std"] or 0.0, fmt="o", label=row["label"]
            )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if axes.containers:
        axes.legend(frameon=False, fontsize="small")
    return figure
