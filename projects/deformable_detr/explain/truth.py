"""Ground truth of one image from a COCO file, matched with the model's own matcher."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.structures import BoxMode
from torchvision.ops import box_convert, box_iou

from ..data.coco_format import check_boxes, read_coco_json
from ..loading import class_index
from ..modeling import HungarianMatcher
from .recorder import Recording


class Truth(NamedTuple):
    """An object that is in the image.

    Attributes:
        label: class index of the model.
        box: xyxy in pixels of the original image.
        query: the query that the matcher gives it to; None where there are more objects than queries.
        iou: of that query's last box with this one.
    """

    label: int
    box: tuple[float, float, float, float]
    query: int | None = None
    iou: float = 0.0


def read_truth(json_path: str | Path, name: str, size: tuple[int, int], class_names: Sequence[str]) -> list[Truth]:
    """Objects of one image to train on, without crowd regions; images are found by their file name, classes by names.

    Args:
        json_path: annotations in COCO's format.
        name: the image's file name, without folders.
        size: (height, width) of the image as it was read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not in COCO's format, does not have this image once, has it in another size, or has an
            object in it without a box, of no category, or of a class unknown to the model.
    """
    content = read_coco_json(str(json_path))
    entries = [entry for entry in content["images"] if Path(entry["file_name"]).name == name]
    if len(entries) != 1:
        raise ValueError(f"{json_path} must have one image of file name {name}, it has {len(entries)}")
    entry = entries[0]
    if (entry["height"], entry["width"]) != tuple(size):
        stated, found = f"{entry['width']}x{entry['height']}", f"{size[1]}x{size[0]}"
        raise ValueError(f"{json_path} says that {name} is {stated} pixels, but the image is {found}")
    names = {category["id"]: category["name"] for category in content["categories"]}
    objects = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
    # What "ignore" marks is a crowd after --repair.
    objects = [a for a in objects if not a.get("iscrowd", 0) and not a.get("ignore", 0)]
    check_boxes(objects, str(json_path))
    truths = []
    for annotation in objects:
        x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        if annotation["category_id"] not in names:
            category = annotation["category_id"]
            raise ValueError(f"{json_path}: annotation {annotation.get('id')} has the unknown category {category}")
        if x1 > x0 and y1 > y0:
            label = class_index(names[annotation["category_id"]], class_names)
            truths.append(Truth(label, (float(x0), float(y0), float(x1), float(y1))))
    return truths


def match_truth(recording: Recording, truths: Sequence[Truth], matcher: HungarianMatcher) -> list[Truth]:
    """Give every object the query that training would give it after the last decoder layer."""
    if not truths:
        return []
    boxes = torch.tensor([truth.box for truth in truths])
    scale = torch.tensor([recording.width, recording.height] * 2)
    target = {
        "labels": torch.tensor([truth.label for truth in truths]),
        "boxes": box_convert(boxes / scale, "xyxy", "cxcywh"),
    }
    ((queries, objects),) = matcher(recording.pred_logits[-1:], recording.pred_boxes[-1:], [target])
    matched = list(truths)
    for query, index in zip(queries.tolist(), objects.tolist(), strict=True):
        iou = box_iou(recording.boxes[-1, query][None], boxes[index][None]).item()
        matched[index] = truths[index]._replace(query=query, iou=iou)
    return matched
