"""One-to-one assignment of predictions to ground truth.

Shapes: Ld layers, N images, Lq predictions per layer and image, K classes, n objects of one image. Boxes are cxcywh in
[0, 1].
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..layers.tuned import PAIRS_AT_ONCE, at_once, in_pieces
from .box_overlap import Corners, generalized_iou
from .classification import Classification, FocalClassification

Target = dict[str, Tensor]
Match = tuple[Tensor, Tensor]


class Predictions(NamedTuple):
    """Predictions of some layers, each of which is matched to the same objects.

    Attributes:
        layers: what to call each of the Ld layers in messages.
        logits: (Ld, N, Lq, K), or (Ld, N, Lq, 1) where every object counts as class 0.
        boxes: (Ld, N, Lq, 4).
        repeat: predictions that each object is matched with (H-DETR, arXiv 2207.13080).
    """

    layers: Sequence[str]
    logits: Tensor
    boxes: Tensor
    repeat: int = 1


class HungarianMatcher(nn.Module):
    """Cheapest bipartite matching under classification, L1 and GIoU costs (DETR eq. 1 and Deformable DETR's variant).

    Args:
        cost_class, cost_bbox, cost_giou: weights of the terms; at least one must not be 0.
        focal_alpha, focal_gamma: of the focal classification cost.
        classification: of the classification cost; None: focal, of these two.
    """

    def __init__(
        self,
        *,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        classification: Classification | None = None,
    ) -> None:
        super().__init__()
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("cost_class, cost_bbox and cost_giou must not all be 0")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.classification = classification or FocalClassification(focal_alpha, focal_gamma)

    def forward(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Target]) -> list[Match]:
        """Match the predictions of one layer, every image on its own.

        Args:
            pred_logits: (N, Lq, K).
            pred_boxes: (N, Lq, 4).
            targets: per image "labels" (n,) int64 in [0, K) and "boxes" (n, 4).

        Returns:
            Per image the indices of matched predictions and of their targets, on the CPU, both of length min(Lq, n).

        Raises:
            FloatingPointError: if a prediction is NaN or infinite, naming the image and what is not finite.
        """
        return self.match([Predictions(["the predictions"], pred_logits[None], pred_boxes[None])], targets)[0][0]

    @torch.no_grad()
    def match(self, predictions: Sequence[Predictions], targets: Sequence[Target]) -> list[list[list[Match]]]:
        """Match several groups of layers with one device synchronisation; see :meth:`forward`.

        Returns:
            The matches of group g, layer l and image i at [g][l][i]; each of length min(Lq, repeat * n).

        Raises:
            FloatingPointError: if a prediction is NaN or infinite, naming the layer and the image.
        """
        objects = [_Objects.of(target) for target in targets]
        images = len(targets)
        pairs = [(group, image) for group in predictions for image in range(images)]
        shapes = [(len(g.boxes), g.boxes.shape[2], len(targets[image]["labels"])) for g, image in pairs]
        # All matrices are written into one buffer, which travels in one copy: the only wait for the device.
        sizes = [math.prod(shape) for shape in shapes]
        flat = torch.empty(sum(sizes), dtype=torch.float32, device=predictions[0].boxes.device)
        for (g, image), part, shape in zip(pairs, flat.split(sizes), shapes, strict=True):
            self._fill_costs(part.view(shape), g.logits[:, image], g.boxes[:, image], objects[image])
        costs = [part.view(shape) for part, shape in zip(flat.cpu().split(sizes), shapes, strict=True)]
        for (group, image), cost in zip(pairs, costs, strict=True):
            _check_finite(cost, group, image, targets[image])
        starts = range(0, len(costs), images)
        return [_assign(costs[start : start + images], g.repeat) for g, start in zip(predictions, starts, strict=True)]

    @torch.no_grad()
    def cost_matrix(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Cost of every pair of one image: logits (..., K), boxes (..., 4) -> (..., n) float32."""
        cost = torch.empty((*boxes.shape[:-1], len(target["labels"])), device=boxes.device)
        self._fill_costs(cost, logits, boxes, _Objects.of(target))
        return cost

    def _fill_costs(self, cost: Tensor, logits: Tensor, boxes: Tensor, objects: "_Objects") -> None:
        """Write :meth:`cost_matrix` into ``cost`` (..., n), contiguous."""
        rows = max(1, at_once(PAIRS_AT_ONCE, cost.device) // max(1, cost.shape[-1]))
        flat = (tensor.flatten(0, -2) for tensor in (cost, logits, boxes))
        for cost_part, logits_part, boxes_part in in_pieces(rows, *flat):
            self._fill_pair_costs(cost_part, logits_part, boxes_part.float(), objects)

    def _fill_pair_costs(self, cost: Tensor, logits: Tensor, boxes: Tensor, objects: "_Objects") -> None:
        """Logits (R, K) and boxes (R, 4) into costs (R, n)."""
        of_boxes = torch.cdist(boxes, objects.boxes, p=1).mul_(self.cost_bbox)
        of_boxes.add_(self.classification.cost(logits, objects.labels), alpha=self.cost_class)
        overlap = generalized_iou(Corners.of(boxes[:, None]), objects.corners)
        torch.sub(of_boxes, overlap, alpha=self.cost_giou, out=cost)

    def extra_repr(self) -> str:
        return f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}"


class _Objects(NamedTuple):
    """The objects of an image: labels (n,), boxes (n, 4) and corners (2, 1, n)."""

    labels: Tensor
    boxes: Tensor
    corners: Corners

    @classmethod
    def of(cls, target: Target) -> "_Objects":
        boxes = target["boxes"].float()
        return cls(target["labels"], boxes, Corners.of(boxes[None]))


def _assign(costs: Sequence[Tensor], repeat: int) -> list[list[Match]]:
    """Cheapest assignments for cost matrices (Ld, Lq, n) of the images of a group, first by layer, then by image."""
    matrices = [np.tile(image.numpy(), repeat) for image in costs]
    assignments = [[linear_sum_assignment(layer) for layer in image] for image in matrices]
    counts = [max(1, image.shape[-1]) for image in costs]
    return [
        [
            (torch.from_numpy(rows), torch.from_numpy(columns % count))
            for (rows, columns), count in zip(layer, counts, strict=True)
        ]
        for layer in zip(*assignments, strict=True)
    ]


def _check_finite(cost: Tensor, group: Predictions, image: int, target: Target) -> None:
    """Keep NaN from scipy, which would not say where it comes from. cost: (Ld, Lq, n) of one image."""
    if np.isfinite(cost.numpy()).all():
        return
    layer = int(cost.isfinite().flatten(1).all(1).logical_not().nonzero()[0])
    parts = {
        "pred_logits": group.logits[layer, image],
        "pred_boxes": group.boxes[layer, image],
        "target boxes": target["boxes"],
    }
    bad = [f"{name} has {int((~part.isfinite()).sum())}" for name, part in parts.items() if not part.isfinite().all()]
    raise FloatingPointError(
        f"matching costs of image {image} in the batch must be finite; non-finite values in {group.layers[layer]}: "
        f"{', '.join(bad) or 'none, but their costs overflow'}"
    )
