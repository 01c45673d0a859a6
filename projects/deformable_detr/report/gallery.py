"""Test images in pairs: on the left the ground truth, on the right what the model detects."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ..data.dataset_dict import get_objects
from ..data.images import read_file
from ..files import replacing_file

# What stands left and right in a pair.
PAIR = ("ground truth", "detections")
PAIRS_PER_ROW = 2
PANEL_SIZE = 440  # px, the longer side of each drawn image
_GAP = 12  # px around each panel
_HEADER = 96  # px, for title, legend and column headings
_LABEL_HEIGHT = 17  # px
_MAX_LEGEND_CLASSES = 12
_DPI = 100


def group_coco_detections(
    detections: Iterable[Mapping], dataset_dicts: Sequence[dict], metadata: Metadata
) -> dict[int | str, Instances]:
    """Turns detections in the COCO results format into ``Instances``, image by image.

    Args:
        detections: of these and maybe of other images: ``bbox`` is (x, y, width, height) in absolute pixels,
            ``category_id`` is the dataset's own id.
        dataset_dicts: the images that are wanted, in Detectron2's format.
        metadata: of the same dataset; its ``thing_dataset_id_to_contiguous_id`` maps the category ids.

    Returns:
        image id -> ``Instances`` with ``pred_boxes`` (xyxy pixels), ``scores`` and ``pred_classes``
        (contiguous); an image without detections has empty ones.
    """
    by_image = defaultdict(list)
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    class_index = metadata.thing_dataset_id_to_contiguous_id
    predictions = {}
    for image in dataset_dicts:
        found = by_image[image["image_id"]]
        instances = Instances((image["height"], image["width"]))
        boxes = torch.tensor([detection["bbox"] for detection in found], dtype=torch.float32).reshape(-1, 4)
        instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        instances.scores = torch.tensor([detection["score"] for detection in found])
        classes = [class_index[detection["category_id"]] for detection in found]
        instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        predictions[image["image_id"]] = instances
    return predictions


def draw_sheet(
    dataset_dicts: Sequence[dict],
    metadata: Metadata,
    detections: Iterable[Mapping],
    png_path: str | Path,
    *,
    num_images: int = 8,
    score_threshold: float = 0.3,
) -> Path:
    """Draws images of a dataset on one sheet, each as the pair of :func:`draw_pair`.

    Args:
        dataset_dicts: images in Detectron2's format; ``num_images`` of them are taken, evenly spaced.
        metadata: of the same dataset; ``thing_classes`` names the classes.
        detections: in the COCO results format, as :func:`group_coco_detections` takes them.
        png_path: the picture to write.
        num_images: at most so many images.
        score_threshold: detections below this score are not drawn.

    Returns:
        ``png_path`` as a ``Path``.

    Raises:
        ValueError: the dataset is empty.
        OSError: an image cannot be read, or the picture not be written.
    """
    if not dataset_dicts:
        raise ValueError(f"there is no image to draw: the dataset {metadata.name} is empty")
    chosen = evenly_spaced(dataset_dicts, num_images)
    predictions = group_coco_detections(detections, chosen, metadata)
    pairs, shown_classes = [], set()
    for image in chosen:
        found = predictions[image["image_id"]]
        pairs.append(draw_pair(image, metadata, found, score_threshold=score_threshold))
        shown_classes.update(entry["category_id"] for entry in get_objects(image))
        shown_classes.update(found.pred_classes[found.scores >= score_threshold].tolist())
    title = f"{metadata.name}: {len(chosen)} of {len(dataset_dicts)} images, scores from {score_threshold:.0%}"
    legend = {metadata.thing_classes[index]: _colour(index) for index in sorted(shown_classes)}
    figure = _arrange(pairs, title=title, legend=legend)
    with replacing_file(png_path) as file:
        FigureCanvasAgg(figure).print_png(str(file))
    return Path(png_path)


def draw_pair(
    image: dict, metadata: Metadata, predictions: Instances, *, score_threshold: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """Draws an image twice: with its ground truth (no crowd regions), and with its detections.

    Args:
        image: one entry of a dataset in Detectron2's format.
        metadata: of the same dataset.
        predictions: ``pred_boxes`` (xyxy pixels of the original image), ``scores`` and ``pred_classes``.
        score_threshold: detections below this score are not drawn.

    Returns:
        Two RGB pictures (H, W, 3) uint8, the longer side ``PANEL_SIZE`` pixels.

    Raises:
        OSError: the image cannot be read.
    """
    found = predictions[predictions.scores >= score_threshold]
    pixels = read_file(image["file_name"])
    objects = get_objects(image)
    boxes = [BoxMode.convert(entry["bbox"], entry["bbox_mode"], BoxMode.XYXY_ABS) for entry in objects]
    truth = _draw_panel(pixels, boxes, [entry["category_id"] for entry in objects], metadata)
    scores = found.scores.tolist()
    return truth, _draw_panel(pixels, found.pred_boxes.tensor.tolist(), found.pred_classes.tolist(), metadata, scores)


def evenly_spaced(dataset_dicts: Sequence[dict], num_images: int) -> list[dict]:
    """Picks at most ``num_images`` images, as far from each other in the dataset as can be."""
    count = min(num_images, len(dataset_dicts))
    return [dataset_dicts[index * len(dataset_dicts) // count] for index in range(count)]


def as_text(name: str) -> str:
    """A name as matplotlib must be given it: between two dollar signs it would read a formula."""
    return name.replace("$", r"\$")


def _colour(class_index: int) -> tuple[float, float, float]:
    return colormaps["tab10"](class_index % 10)[:3]


def _draw_panel(
    pixels: np.ndarray,
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    metadata: Metadata,
    scores: Sequence[float] | None = None,
) -> np.ndarray:
    """Draws labelled boxes (xyxy pixels) on an RGB image, enlarged or reduced to ``PANEL_SIZE``."""
    height, width = pixels.shape[:2]
    scale = PANEL_SIZE / max(height, width)
    # The image itself is enlarged, so that lines and letters are as sharp on a small one as on a large one.
    size = (round(width * scale), round(height * scale))
    visualizer = Visualizer(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)), metadata)
    texts = [metadata.thing_classes[index] for index in classes]
    if scores is not None:
        texts = [f"{text} {score:.0%}" for text, score in zip(texts, scores, strict=True)]
    # Lowest scores first, so that the surest detection lies on top.
    for index in reversed(range(len(texts))):
        colour = _colour(classes[index])
        box = [value * scale for value in boxes[index]]
        visualizer.draw_box(box, edge_color=colour, alpha=1.0)
        label_top = box[1] - _LABEL_HEIGHT if box[1] >= _LABEL_HEIGHT else min(box[3], size[1] - _LABEL_HEIGHT)
        # Boxes are not clipped: those of objects at the border often begin outside.
        label_left = max(0, min(box[0], size[0] - 8 * len(texts[index])))
        visualizer.draw_text(
            as_text(texts[index]), (label_left, label_top), font_size=9, color="white", horizontal_alignment="left"
        )
    return visualizer.get_output().get_image()


def _arrange(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    title: str,
    legend: Mapping[str, tuple[float, float, float]],
) -> Figure:
    """Lays out pairs of RGB panels on one white sheet, each row as high as its highest panel."""
    rows = [pairs[start : start + PAIRS_PER_ROW] for start in range(0, len(pairs), PAIRS_PER_ROW)]
    row_heights = [max(panel.shape[0] for panel, _ in row) + _GAP for row in rows]
    cell_width = PANEL_SIZE + _GAP
    num_columns = 2 * min(len(pairs), PAIRS_PER_ROW)
    width, height = num_columns * cell_width + _GAP, _HEADER + sum(row_heights)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    figure.text(_GAP / width, 1 - 16 / height, title, va="center", fontsize=13, fontweight="bold")
    patches = [Patch(color=colour, label=as_text(name)) for name, colour in list(legend.items())[:_MAX_LEGEND_CLASSES]]
    if patches:
        figure.legend(
            handles=patches,
            loc="center left",
            bbox_to_anchor=(0, 1 - 46 / height),
            ncols=len(patches),
            frameon=False,
        )
    for column in range(num_columns):
        figure.text((_GAP + column * cell_width) / width, 1 - 78 / height, PAIR[column % 2], va="center", fontsize=11)
    top = _HEADER
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, panel in enumerate(panel for pair in row for panel in pair):
            figure.figimage(panel, xo=_GAP + column * cell_width, yo=height - top - panel.shape[0])
        top += row_height
    return figure
