"""The drawings of a report: matplotlib figures of one pair of axes each, so that a phone shows them one by one."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..detect.drawing import as_text
from ..training.metrics import Metrics, series

_SIZE = (5.2, 3.3)  # inches
_MAX_POINTS = 400
# Matrices up to this size have their counts written into the cells.
_MAX_NUMBERED = 12


def new_figure(size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    """Return a figure of ``size`` in inches, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def thin_out(iterations: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Replace groups of neighbours by their means where there are more points than can be seen.

    A group with a value that is not finite has no finite mean, so that the gap stays in the curve.
    """
    group = -(-len(values) // _MAX_POINTS) or 1
    starts = np.arange(0, len(values), group)
    counts = np.diff([*starts, len(values)])
    with np.errstate(invalid="ignore"):
        means = [np.add.reduceat(np.asarray(array, dtype=float), starts) / counts for array in (iterations, values)]
    return means[0], means[1]


def curves(metrics: Metrics, labels: Mapping[str, str], *, ylabel: str = "", marker: str | None = None) -> Figure:
    """Draw metrics over the iterations.

    Args:
        labels: metric -> its name in the legend; decoder layers and the encoder get colours by their order.
    """
    figure, axes = new_figure()
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(labels))) if len(labels) > 4 else [None] * len(labels)
    for (name, label), colour in zip(labels.items(), colours, strict=True):
        iterations, values = series(metrics, name)
        points = (iterations, values) if marker else thin_out(iterations, values)
        # A single point draws no line.
        axes.plot(
            *points,
            label=as_text(label),
            color=colour,
            linewidth=1.3,
            marker=marker or ("." if len(values) < 2 else None),
            clip_on=not marker,
        )
    axes.set_xlabel("iteration")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    if axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(labels) > 1:
        axes.legend(frameon=False, fontsize="small")
    return figure


def bars(values: Mapping[str, float], earlier: Mapping[str, float]) -> Figure:
    """Draw AP (%) of categories, the best first; a ring marks what the evaluation before had."""
    names = sorted(values, key=values.get)
    figure, axes = new_figure((5.2, 0.7 + 0.2 * len(names)))
    axes.barh(range(len(names)), [values[name] for name in names], color="#3b75af", height=0.7)
    rings = [(earlier[name], row) for row, name in enumerate(names) if np.isfinite(earlier.get(name, np.nan))]
    if rings:
        axes.plot(*zip(*rings, strict=True), "o", color="black", fillstyle="none", markersize=4)
    axes.set_yticks(range(len(names)), [as_text(name) for name in names], fontsize="small")
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlim(0, 100)
    axes.set_xlabel("AP (%)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def precision_recall(recall: np.ndarray, precision: Mapping[str, np.ndarray], *, small: bool = False) -> Figure:
    """Draw precision over recall, one line for each IoU threshold; AP in percent in the legend, for which a small one
    has no room."""
    figure, axes = new_figure((2.6, 2.4) if small else _SIZE)
    for label, values in precision.items():
        axes.plot(recall, values, label=f"{label}: AP {100 * values.mean():.1f}", linewidth=1.3)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.3)
    if not small:
        axes.legend(frameon=False, fontsize="small")
    return figure


def confusion(counts: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Draw a matrix of counts, each row shaded by the shares of its cells."""
    side = 1.6 + (0.2 if len(rows) > _MAX_NUMBERED else 0.42) * len(rows)
    figure = Figure(figsize=(side + 0.5, side), layout="constrained")
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = "small" if len(rows) <= _MAX_NUMBERED else 8
    axes.set_xticks(range(len(columns)), [as_text(name) for name in columns], rotation=90, fontsize=size)
    axes.set_yticks(range(len(rows)), [as_text(name) for name in rows], fontsize=size)
    axes.tick_params(labeltop=len(rows) > _MAX_NUMBERED)
    axes.set_xlabel("detected as")
    axes.set_ylabel("is")
    if len(rows) <= _MAX_NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.6 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize="small")
    return figure


def scores(values: np.ndarray, correct: np.ndarray, threshold: float) -> Figure:
    """Draw how many detections have which score, those that found an object of their class apart."""
    figure, axes = new_figure()
    groups = [values[correct], values[~correct]]
    axes.hist(groups, bins=np.linspace(0, 1, 21), stacked=True, label=["right", "wrong"], color=["#3b8f5a", "#c8553d"])
    axes.axvline(threshold, color="black", linewidth=1, linestyle=":")
    # Of the hundred detections of an image, most have a score near 0.
    axes.set_yscale("symlog", linthresh=10)
    axes.set(xlim=(0, 1), xlabel="score", ylabel="detections")
    axes.legend(frameon=False, fontsize="small")
    return figure


def calibration(values: np.ndarray, correct: np.ndarray) -> Figure:
    """Draw the share of right detections by score; on the diagonal a score is a probability."""
    figure, axes = new_figure()
    edges = np.linspace(0, 1, 11)
    bins = np.clip(np.digitize(values, edges) - 1, 0, 9)
    counts = np.bincount(bins, minlength=10)
    filled = counts > 0
    share = np.bincount(bins, weights=correct, minlength=10)[filled] / counts[filled]
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle=":")
    axes.plot((edges[:-1] + 0.05)[filled], share, marker="o", markersize=4)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="score", ylabel="share that is right")
    axes.grid(alpha=0.3)
    return figure
