"""From predictions to detections: the official selection, and Detectron2's format.

Shapes: N images, Lq queries, K classes, k detections of an image.
"""

from collections.abc import Sequence
from typing import NamedTuple

from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_convert


class Detections(NamedTuple):
    """The k best pairs of query and class of N images, best first.

    Attributes:
        boxes: (N, k, 4) xyxy in [0, 1] of each image without its padding.
        scores: (N, k) in [0, 1].
        labels: (N, k) classes.
        queries: (N, k) indices into the Lq queries.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    queries: Tensor


def select_detections(logits: Tensor, boxes: Tensor, limit: int) -> Detections:
    """Select the highest class scores over all queries, as the official evaluation does.

    A query may appear with several classes. Boxes are neither clipped to the image nor filtered, exactly as the
    published APs were measured.

    Args:
        logits: (N, Lq, K).
        boxes: (N, Lq, 4) cxcywh in [0, 1].
        limit: largest k.
    """
    num_classes = logits.shape[-1]
    scores = logits.float().sigmoid().flatten(1)
    scores, index = scores.topk(min(limit, scores.shape[1]), dim=1)
    queries = index.div(num_classes, rounding_mode="floor")
    corners = box_convert(boxes.float(), "cxcywh", "xyxy").gather(1, queries[..., None].expand(-1, -1, 4))
    return Detections(corners, scores, index % num_classes, queries)


def select_one_per_query(scores: Tensor, boxes: Tensor, limit: int) -> Detections:
    """Select the queries whose best classes have the highest scores, as DETR's evaluation does: each query once.

    Boxes are neither clipped nor filtered, as in :func:`select_detections`.

    Args:
        scores: (N, Lq, K) of the classes, without "no object".
        boxes: (N, Lq, 4) cxcywh in [0, 1].
        limit: largest k.
    """
    best, labels = scores.max(-1)
    best, queries = best.topk(min(limit, best.shape[1]), dim=1)
    corners = box_convert(boxes.float(), "cxcywh", "xyxy").gather(1, queries[..., None].expand(-1, -1, 4))
    return Detections(corners, best, labels.gather(1, queries), queries)


def to_instances(
    boxes: Tensor, scores: Tensor, labels: Tensor, sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Instances]]:
    """Return what Detectron2 expects of a detector.

    Args:
        boxes: (N, k, 4) xyxy in [0, 1].
        scores, labels: (N, k).
        sizes: N heights and widths in pixels to which boxes are scaled.

    Returns:
        Per image ``{"instances": Instances(pred_boxes, scores, pred_classes)}``.
    """
    results = []
    for (height, width), *found in zip(sizes, boxes, scores, labels, strict=True):
        result = Instances((height, width))
        result.pred_boxes = Boxes(found[0] * boxes.new_tensor([width, height, width, height]))
        result.scores, result.pred_classes = found[1:]
        results.append({"instances": result})
    return results
