"""The picture of an explanation: a row per query with what it looks at, its boxes, and the encoder under it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..detect.drawing import as_text, matplotlib_letters
from ..detect.images import shrink
from ..files import replacing_file
from .explanation import Explanation
from .recorder import AttentionMap, Sampling
from .selection import Detection

# Blue for low weights and red for high ones, as in the paper's figures; the darkest ends are hard to tell apart.
WEIGHT_COLOURS = colormaps["turbo"].resampled(256)(np.linspace(0.08, 0.95, 256))[:, :3]
TRUTH_COLOUR = "#111111"
BOX_COLOUR = "#00a060"
_PANEL_WIDTH = 4.0  # inches
_TEXT_HEIGHT = 0.55  # inches above each panel, for its title
_DPI = 120
_MAX_SIDE = 1280  # px of the image behind the points, more than a panel shows
_LEGEND = (
    "points: attention weight from blue (low) to red (highest of the panel), also as size; "
    "cross: reference point; black dashes: matched ground truth"
)
_DENSE_LEGEND = (
    "cells: attention weight, mean of the heads, from blue (low) to red (highest of the panel); "
    "black dashes: matched ground truth"
)
_OUTLINE = [patheffects.withStroke(linewidth=3, foreground="white")]


def draw_explanation(
    explanation: Explanation, path: str | Path, *, layer: int | None = None, encoder_layer: int | None = None
) -> Path:
    """Draw the chosen detections, one row each.

    On the left the sampling points of all heads and levels in one decoder layer, coloured and sized by attention
    weight, with the reference point as a cross (the paper's figure of the decoder), or DETR's attention map, the mean
    of its heads; then the boxes of all decoder layers; on the right what the encoder cells over the chosen pixel, or
    the box's centre, look at.

    Args:
        path: the picture to write, in a format of matplotlib's.
        layer, encoder_layer: counted from 1; the last by default.

    Returns:
        ``path`` as a ``Path``.

    Raises:
        ValueError: there is no such layer.
    """
    recording = explanation.recording
    layer = check_layer(layer, len(recording.decoder), "decoder")
    if recording.encoder:
        encoder_layer = check_layer(encoder_layer, len(recording.encoder), "encoder")
    explanation = replace(explanation, image=shrink(explanation.image, _MAX_SIDE))
    with matplotlib_letters(explanation.class_names):
        figure = _draw_figure(explanation, layer, encoder_layer)
        with replacing_file(path) as file:
            FigureCanvasAgg(figure).print_figure(str(file))
    return Path(path)


def _draw_figure(explanation: Explanation, layer: int, encoder_layer: int | None) -> Figure:
    recording = explanation.recording
    rows, columns = len(explanation.chosen), 3 if recording.encoder else 2
    height = _PANEL_WIDTH * recording.height / recording.width + _TEXT_HEIGHT
    figure = Figure((columns * _PANEL_WIDTH, rows * height), dpi=_DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for row, index in zip(panels, explanation.chosen, strict=True):
        detection = explanation.detections[index]
        _draw_query(row[0], explanation, detection, layer)
        _draw_path(row[1], explanation, detection)
        if recording.encoder:
            _draw_pixel(row[2], explanation, detection, encoder_layer)
    figure.supxlabel(_DENSE_LEGEND if recording.is_dense else _LEGEND, fontsize=9)
    return figure


def check_layer(layer: int | None, count: int, stack: str) -> int:
    """Return a layer counted from 1, the last for None; raise a ValueError where there is no such layer."""
    if layer is None:
        return count
    if not 1 <= layer <= count:
        raise ValueError(f"{stack} layer must be from 1 to {count}, got {layer}")
    return layer


def _draw_query(panel: Axes, explanation: Explanation, detection: Detection, layer: int) -> None:
    attention = explanation.recording.decoder[layer - 1]
    _draw_image(panel, explanation)
    words = _draw_attention(panel, attention, [detection.query], explanation)
    _draw_box(panel, explanation.recording.boxes[layer - 1, detection.query].tolist(), BOX_COLOUR)
    _draw_truth(panel, explanation, detection)
    panel.set_title(f"{as_text(explanation.label_of(detection))}\ndecoder layer {layer}{words}", fontsize=9)


def _draw_path(panel: Axes, explanation: Explanation, detection: Detection) -> None:
    """Boxes after every layer, light to dark, and the references that the layers looked around."""
    recording, query = explanation.recording, detection.query
    _draw_image(panel, explanation)
    shades = colormaps["viridis"](np.linspace(0.95, 0.0, len(recording.decoder) + 1))
    references = [] if recording.is_dense else [layer.reference[query] for layer in recording.decoder]
    if references and len(references[0]) == 4:
        x, y, width, height = references[0].tolist()
        _draw_box(panel, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), shades[0], linestyle=":")
    boxes = recording.boxes[:, query].tolist()
    for number, (box, shade) in enumerate(zip(boxes, shades[1:], strict=True), start=1):
        _draw_box(panel, box, shade, label=f"layer {number}")
    _draw_truth(panel, explanation, detection)
    for reference, shade in zip(references, shades, strict=False):
        _draw_cross(panel, reference, shade)
    truth = explanation.truth_of(detection)
    matched = f"matched {as_text(explanation.class_names[truth.label])}, IoU {truth.iou:.2f}" if truth else ""
    what = "box" if recording.is_dense else "reference (cross) and box"
    panel.set_title(f"{what}, light to dark\n{matched}", fontsize=9)


def _draw_pixel(panel: Axes, explanation: Explanation, detection: Detection, layer: int) -> None:
    recording = explanation.recording
    x0, y0, x1, y1 = detection.box
    x, y = explanation.pixel or ((x0 + x1) / 2, (y0 + y1) / 2)
    # A box may reach beyond the image, whose border cells are then the nearest.
    x, y = min(max(x, 0), recording.width - 1), min(max(y, 0), recording.height - 1)
    _draw_image(panel, explanation)
    words = _draw_attention(panel, recording.encoder[layer - 1], recording.cells_at(x, y), explanation)
    if recording.is_dense:
        _draw_cross(panel, Tensor([x, y]), BOX_COLOUR)
    cells = "encoder cell" if recording.is_dense else "encoder cells of all levels"
    panel.set_title(f"{cells} at ({x:.0f}, {y:.0f})\nencoder layer {layer}{words}", fontsize=9)


def _draw_image(panel: Axes, explanation: Explanation) -> None:
    height, width = explanation.recording.height, explanation.recording.width
    # Faded, so that points of every colour stand out; pixel (0, 0) spans from 0 to 1, as boxes and points count.
    panel.imshow(explanation.image, extent=(0, width, height, 0), alpha=0.6)
    panel.set(xlim=(0, width), ylim=(height, 0))
    panel.axis("off")


def _draw_attention(
    panel: Axes, attention: Sampling | AttentionMap, queries: Sequence[int], explanation: Explanation
) -> str:
    """Draw what the queries look at; returns words about it."""
    if isinstance(attention, Sampling):
        return _draw_points(panel, attention, queries, explanation)
    weights = attention.weights[queries].mean((0, 1)).numpy()
    share = weights / weights.max()
    extent = (0, explanation.recording.width, explanation.recording.height, 0)
    # Cells of no weight leave the image to be seen.
    panel.imshow(WEIGHT_COLOURS[(share * 255).astype(int)], extent=extent, alpha=0.1 + 0.7 * share)
    rows, columns = weights.shape
    return f", {columns} x {rows} cells, highest weight {weights.max():.3f}"


def _draw_points(panel: Axes, sampling: Sampling, queries: Sequence[int], explanation: Explanation) -> str:
    """Draw what the queries sample; returns words on how many points are not in the picture."""
    locations = sampling.locations[queries].flatten(0, -2).numpy()
    weights = sampling.weights[queries].flatten().numpy()
    order = weights.argsort()  # the heaviest on top
    share = (weights / weights.max())[order]
    colours = WEIGHT_COLOURS[(share * 255).astype(int)]
    panel.scatter(*locations[order].T, s=4 + 36 * share, c=colours, linewidths=0.3, edgecolors="black")
    for query in queries:
        _draw_cross(panel, sampling.reference[query], BOX_COLOUR)
    size = explanation.recording.width, explanation.recording.height
    outside = ((locations < 0) | (locations > size)).any(1).sum()
    return f", {outside} of {len(locations)} points outside" if outside else f", {len(locations)} points"


def _draw_cross(panel: Axes, reference: Tensor, colour) -> None:
    x, y = reference[:2].tolist()
    panel.plot(x, y, "+", color=colour, markersize=11, markeredgewidth=2, path_effects=_OUTLINE)


def _draw_box(panel: Axes, box: Sequence[float], colour, **style) -> None:
    x0, y0, x1, y1 = box
    style = {"linewidth": 1.6, "path_effects": _OUTLINE, **style}
    panel.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, **style))


def _draw_truth(panel: Axes, explanation: Explanation, detection: Detection) -> None:
    truth = explanation.truth_of(detection)
    if truth is not None:
        _draw_box(panel, truth.box, TRUTH_COLOUR, linestyle="--", linewidth=1.2)
