"""A sheet of test images: on the left of each pair the ground truth, on the right what the model detects."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

PAIRS_PER_ROW = 2
PANEL_SIZE = 440  # px, the longer side of each drawn image
_GAP = 12  # px around each panel
_HEADER = 96  # px, for title, legend and column headings
_LABEL_HEIGHT = 17  # px
_MAX_LEGEND_CLASSES = 12
_DPI = 100


def load_coco_predictions(
    path: str | Path, dataset_dicts: Sequence[dict], metadata: Metadata
) -> dict[int | str, Instances]:
    """Reads detections in the COCO results format, as ``COCOEvaluator`` writes them.

    Args:
        path: ``coco_instances_results.json``: ``bbox`` is (x, y, width, height) in absolute pixels,
            ``category_id`` is the dataset's own id.
        dataset_dicts: the images the detections belong to, in Detectron2's format.
        metadata: of the same dataset; its ``thing_dataset_id_to_contiguous_id`` maps the category ids.

    Returns:
        image id -> ``Instances`` with ``pred_boxes`` (xyxy pixels), ``scores`` and ``pred_classes``
        (contiguous); an image without detections has empty ones.

    Raises:
        ValueError: a detection names a category that the dataset does not have.
    """
    detections = defaultdict(list)
    for detection in json.loads(Path(path).read_text()):
        detections[detection["image_id"]].append(detection)
    predictions = {}
    for image in dataset_dicts:
        found = detections[image["image_id"]]
        instances = Instances((image["height"], image["width"]))
        boxes = torch.tensor([detection["bbox"] for detection in found], dtype=torch.float32).reshape(-1, 4)
        instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        instances.scores = torch.tensor([detection["score"] for detection in found])
        classes = [_contiguous_id(detection["category_id"], metadata, path) for detection in found]
        instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        predictions[image["image_id"]] = instances
    return predictions


def _contiguous_id(category_id: int, metadata: Metadata, path: str | Path) -> int:
    id_map = metadata.thing_dataset_id_to_contiguous_id
    if category_id not in id_map:
        raise ValueError(f"{path}: category_id {category_id} is not one of dataset {metadata.name}: {sorted(id_map)}")
    return id_map[category_id]


def draw_gallery(
    dataset_dicts: Sequence[dict],
    metadata: Metadata,
    predictions: Mapping[int | str, Instances],
    png_path: str | Path,
    *,
    num_images: int = 8,
    score_threshold: float = 0.3,
) -> Path:
    """Draws images of a dataset in pairs: ground truth on the left, predictions on the right.

    Args:
        dataset_dicts: images in Detectron2's format; ``num_images`` of them are taken, evenly spaced.
        metadata: of the same dataset; ``thing_classes`` names the classes.
        predictions: image id -> ``Instances`` with ``pred_boxes`` (xyxy pixels of the original image),
            ``scores`` and ``pred_classes``, from ``load_coco_predictions`` or straight from a model.
        png_path: the picture to write.
        num_images: at most so many images.
        score_threshold: detections below this score are not drawn.

    Returns:
        ``png_path`` as a ``Path``.

    Raises:
        ValueError: the dataset is empty, ``num_images`` is below 1, or an image has no entry in
            ``predictions``.
    """
    chosen = _evenly_spaced(dataset_dicts, num_images)
    pairs, shown_classes = [], set()
    for image in chosen:
        if image["image_id"] not in predictions:
            raise ValueError(f"there are no predictions for image_id {image['image_id']} of dataset {metadata.name}")
        found = predictions[image["image_id"]].to("cpu")
        found = found[found.scores >= score_threshold]
        annotations = [entry for entry in image["annotations"] if not entry.get("iscrowd", 0)]
        true_boxes = [BoxMode.convert(entry["bbox"], entry["bbox_mode"], BoxMode.XYXY_ABS) for entry in annotations]
        true_classes = [entry["category_id"] for entry in annotations]
        found_classes = found.pred_classes.tolist()
        pixels = read_image(image["file_name"], "RGB")
        truth = _draw_panel(pixels, true_boxes, true_classes, metadata)
        detected = _draw_panel(pixels, found.pred_boxes.tensor.tolist(), found_classes, metadata, found.scores.tolist())
        pairs.append((truth, detected))
        shown_classes.update(true_classes, found_classes)
    title = f"{metadata.name}: {len(chosen)} of {len(dataset_dicts)} images, scores from {score_threshold:.0%}"
    figure = _arrange(pairs, title=title, legend={metadata.thing_classes[i]: _colour(i) for i in sorted(shown_classes)})
    FigureCanvasAgg(figure).print_png(str(png_path))
    return Path(png_path)


def _evenly_spaced(dataset_dicts: Sequence[dict], num_images: int) -> list[dict]:
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if not dataset_dicts:
        raise ValueError("there is no image to draw: the dataset is empty")
    count = min(num_images, len(dataset_dicts))
    return [dataset_dicts[index * len(dataset_dicts) // count] for index in range(count)]


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
        label_left = min(box[0], size[0] - 8 * len(texts[index]))
        visualizer.draw_text(
            texts[index], (label_left, label_top), font_size=9, color="white", horizontal_alignment="left"
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
    patches = [Patch(color=colour, label=name) for name, colour in list(legend.items())[:_MAX_LEGEND_CLASSES]]
    if patches:
        figure.legend(
            handles=patches,
            loc="center left",
            bbox_to_anchor=(0, 1 - 46 / height),
            ncols=len(patches),
            frameon=False,
        )
    for column in range(num_columns):
        heading = "predictions" if column % 2 else "ground truth"
        figure.text((_GAP + column * cell_width) / width, 1 - 78 / height, heading, va="center", fontsize=11)
    top = _HEADER
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, panel in enumerate(panel for pair in row for panel in pair):
            figure.figimage(panel, xo=_GAP + column * cell_width, yo=height - top - panel.shape[0])
        top += row_height
    return figure
