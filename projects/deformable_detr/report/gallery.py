"""Test images in pairs: on the left the ground truth, on the right what the model detects."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image, ImageDraw

from ..data.dataset_dict import get_objects
from ..data.images import read_file
from ..detect.drawing import Line, draw_boxes
from ..files import replacing_file

# What stands left and right in a pair.
PAIR = ("ground truth", "detections")
PAIRS_PER_ROW = 2
PANEL_SIZE = 440  # px, the longer side of each image on a sheet
_GAP = 12  # px around each panel
_HEADER = 96  # px, for title and column headings


def group_coco_detections(
    detections: Iterable[Mapping], dataset_dicts: Sequence[dict], metadata: Metadata
) -> dict[int | str, Instances]:
    """Turn detections in the COCO results format into ``Instances``, image by image.

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
        found = sorted(by_image[image["image_id"]], key=lambda detection: -detection["score"])
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
    """Draw images of a dataset on one sheet, each as the pair of :func:`draw_pair`.

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
    pairs = [
        draw_pair(image, metadata, predictions[image["image_id"]], score_threshold=score_threshold) for image in chosen
    ]
    source = Path(metadata.get("json_file", metadata.name)).name
    title = f"{source}: {len(chosen)} of {len(dataset_dicts)} images, scores from {score_threshold:.0%}"
    with replacing_file(png_path) as file:
        _arrange(pairs, title).save(file)
    return Path(png_path)


def draw_pair(
    image: dict, metadata: Metadata, predictions: Instances, *, score_threshold: float = 0.3, side: int = PANEL_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image twice: with its ground truth (no crowd regions), and with its detections.

    Args:
        image: one entry of a dataset in Detectron2's format.
        metadata: of the same dataset.
        predictions: ``pred_boxes`` (xyxy pixels of the original image), ``scores`` and ``pred_classes``, best first.
        score_threshold: detections below this score are not drawn.
        side: pixels of the longer side.

    Returns:
        Two RGB pictures (H, W, 3) uint8.

    Raises:
        OSError: the image cannot be read.
    """
    names = metadata.thing_classes
    found = predictions[predictions.scores >= score_threshold]
    objects = get_objects(image)
    true_boxes = [BoxMode.convert(entry["bbox"], entry["bbox_mode"], BoxMode.XYXY_ABS) for entry in objects]
    true_classes, classes = [entry["category_id"] for entry in objects], found.pred_classes.tolist()
    texts = [f"{names[index]} {score:.0%}" for index, score in zip(classes, found.scores.tolist(), strict=True)]
    picture = Image.fromarray(read_file(image["file_name"]))
    scale = side / max(picture.size)
    # The image itself is enlarged, so that lines and letters are as sharp on a small one as on a large one.
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    return (
        draw_boxes(pixels, np.multiply(true_boxes, scale), true_classes, [names[index] for index in true_classes]),
        draw_boxes(pixels, found.pred_boxes.tensor.numpy() * scale, classes, texts),
    )


def evenly_spaced(dataset_dicts: Sequence[dict], num_images: int) -> list[dict]:
    """Pick at most ``num_images`` images, as far from each other in the dataset as can be."""
    count = min(num_images, len(dataset_dicts))
    return [dataset_dicts[index * len(dataset_dicts) // count] for index in range(count)]


def _arrange(pairs: Sequence[tuple[np.ndarray, np.ndarray]], title: str) -> Image.Image:
    """Lay out pairs of RGB panels on one white sheet, each row as high as its highest panel."""
    rows = [pairs[start : start + PAIRS_PER_ROW] for start in range(0, len(pairs), PAIRS_PER_ROW)]
    heights = [max(panel.shape[0] for panel, _ in row) + _GAP for row in rows]
    columns = [_GAP + index * (PANEL_SIZE + _GAP) for index in range(2 * min(len(pairs), PAIRS_PER_ROW))]
    sheet = Image.new("RGB", (columns[-1] + PANEL_SIZE + _GAP, _HEADER + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    Line(title, 22).draw(draw, _GAP, _GAP, "black")
    for index, left in enumerate(columns):
        Line(PAIR[index % 2], 18).draw(draw, left, _HEADER - 34, "black")
    top = _HEADER
    for row, height in zip(rows, heights, strict=True):
        for left, panel in zip(columns, (panel for pair in row for panel in pair), strict=False):
            sheet.paste(Image.fromarray(panel), (left, top))
        top += height
    return sheet
