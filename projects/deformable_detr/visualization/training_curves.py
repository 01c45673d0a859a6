"""Curves of a training run, from the ``metrics.json`` that Detectron2's ``JSONWriter`` writes."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Metrics = dict[int, dict[str, float]]

# The last decoder layer's losses: those of the other layers end in a number, those of the encoder in "_enc".
_MAIN_LOSS = re.compile(r"loss_(?!.*_(\d+|enc)$)\w+")
_FIGURE_INCHES = (12.0, 7.5)
_DPI = 100


def read_metrics(path: str | Path) -> Metrics:
    """Reads a ``metrics.json``, also while the run still writes to it.

    A resumed run goes back to its checkpoint: what the interrupted run had written past that point is
    dropped. A line cut short by an interruption is left out with a warning.

    Args:
        path: file with one JSON object per line, each with an ``iteration``.

    Returns:
        iteration -> name -> value, in ascending order of iterations.

    Raises:
        ValueError: the file has no complete line.
    """
    metrics: Metrics = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s, line %d is not complete and is left out", path, number)
            continue
        iteration = row.pop("iteration")
        if metrics and iteration < max(metrics):
            metrics = {past: values for past, values in metrics.items() if past < iteration}
        metrics.setdefault(iteration, {}).update(row)
    if not metrics:
        raise ValueError(f"{path} has no complete line of metrics yet")
    return metrics


def series(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """Returns the iterations at which a metric was written, and its values there."""
    points = [(iteration, row[name]) for iteration, row in metrics.items() if name in row]
    return [iteration for iteration, _ in points], [value for _, value in points]


def plot_training_curves(metrics_path: str | Path, png_path: str | Path) -> Path:
    """Draws total loss, the last decoder layer's loss terms, box AP and learning rate over the iterations.

    Args:
        metrics_path: ``metrics.json`` of a finished, running or resumed run.
        png_path: the picture to write, 1200 x 750 pixels.

    Returns:
        ``png_path`` as a ``Path``.

    Raises:
        ValueError: ``metrics_path`` holds no metrics yet.
    """
    metrics = read_metrics(metrics_path)
    names = sorted({name for row in metrics.values() for name in row})
    loss_terms = {name: name for name in names if _MAIN_LOSS.fullmatch(name)}
    average_precisions = {name: name.removeprefix("bbox/") for name in names if re.search(r"bbox/AP(50)?$", name)}

    figure = Figure(figsize=_FIGURE_INCHES, dpi=_DPI, layout="constrained")
    ((total_axes, ap_axes), (terms_axes, lr_axes)) = figure.subplots(2, 2)
    _plot(total_axes, metrics, {"total_loss": "total loss"}, title="Total loss")
    _plot(ap_axes, metrics, average_precisions, title="Box AP on the test set (%)", marker="o")
    ap_axes.set_ylim(0, 100)
    _plot(terms_axes, metrics, loss_terms, title="Loss terms of the last decoder layer")
    _plot(lr_axes, metrics, {"lr": "learning rate"}, title="Learning rate")
    lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    FigureCanvasAgg(figure).print_png(str(png_path))
    return Path(png_path)


def _plot(axes: Axes, metrics: Metrics, labels: Mapping[str, str], *, title: str, marker: str | None = None) -> None:
    for name, label in labels.items():
        iterations, values = series(metrics, name)
        # A single point draws no line.
        axes.plot(iterations, values, label=label, marker=marker or ("." if len(values) == 1 else None))
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("iteration")
    axes.set_xlim(0, max(1, *metrics))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(labels) > 1:
        axes.legend(frameon=False)
    if not labels:
        axes.text(0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center", color="gray")
