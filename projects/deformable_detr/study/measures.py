"""What is read from a finished training: curves, and how often an object was detected twice."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from detectron2.structures import Boxes, BoxMode, pairwise_iou

from ..training.metrics import Metrics, series, training_seconds

# What an evaluation leaves in metrics.json, by its name in the results.
EVALUATED = {"AP": "bbox/AP", "AP50": "bbox/AP50", "APs": "bbox/APs"}


def learning_curve(metrics: Metrics, *, iterations: int) -> list[dict[str, float]]:
    """Return "iteration", "seconds" of training until then, and AP (%), of every evaluation.

    Seconds are those of steps, evaluations left out.

    Args:
        iterations: length of the training.
    """
    curve = []
    for evaluated in series(metrics, EVALUATED["AP"])[0]:
        # Counted from 0; the last evaluation, which follows the training, has the number of the next iteration.
        done = min(evaluated + 1, iterations)
        until = {past: row for past, row in metrics.items() if past < done}
        scores = {name: metrics[evaluated][key] for name, key in EVALUATED.items() if key in metrics[evaluated]}
        curve.append({"iteration": done, "seconds": training_seconds(until), **scores})
    return curve


def count_duplicates(
    detections: Iterable[Mapping[str, Any]], *, min_iou: float = 0.7, min_score: float = 0.3
) -> dict[str, int]:
    """Count pairs of detections of one class in one image that overlap.

    Args:
        detections: in COCO's format of results; ``bbox`` is (x, y, width, height).
        min_iou: an overlap above it makes a pair.
        min_score: detections below it do not count.

    Returns:
        "detections" that count, and "duplicates", the pairs among them.
    """
    groups = defaultdict(list)
    for detection in detections:
        if detection["score"] >= min_score:
            groups[detection["image_id"], detection["category_id"]].append(detection["bbox"])
    pairs = 0
    for boxes in groups.values():
        xyxy = Boxes(BoxMode.convert(torch.tensor(boxes), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        pairs += int((pairwise_iou(xyxy, xyxy).triu(diagonal=1) > min_iou).sum())
    return {"detections": sum(map(len, groups.values())), "duplicates": pairs}
