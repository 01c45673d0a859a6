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

# From so many pairs of a prediction and an object on, an assignment considers each object's cheapest predictions alone.
# scipy takes 1.3 ms for 22,223 proposals and 7 objects, 15 for 60 objects, for which a GPU waits.
PAIRS_TO_ASSIGN = 2**14

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
        transfers = [_Transfer.plan(*g.boxes.shape[::2], len(targets[i]["labels"]), g.repeat) for g, i in pairs]
        # Everything is written into one buffer, which travels in one copy: the only wait for the device.
        sizes = [transfer.size for transfer in transfers]
        flat = torch.empty(sum(sizes), dtype=torch.float32, device=predictions[0].boxes.device)
        for (g, image), part, transfer in zip(pairs, flat.split(sizes), transfers, strict=True):
            cost = part.view(transfer.shape) if transfer.is_whole else part.new_empty(transfer.shape)
            self._fill_costs(cost, g.logits[:, image], g.boxes[:, image], objects[image])
            if not transfer.is_whole:
                transfer.write_cheapest(cost, part)
        parts = np.split(flat.cpu().numpy(), np.cumsum(sizes)[:-1])
        costs = [transfer.read(part) for transfer, part in zip(transfers, parts, strict=True)]
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


class _Costs(NamedTuple):
    """Costs of the predictions of one layer for the objects of one image, on the host.

    Attributes:
        matrix: (R, n); infinite for pairs that need not be considered.
        rows: (R,) which predictions they are, in order; None if they are all.
        is_finite: whether all costs are, also those that have stayed on the device.
    """

    matrix: np.ndarray
    rows: np.ndarray | None
    is_finite: bool


class _Transfer(NamedTuple):
    """What of the costs (Ld, Lq, n) of an image travels to the host: all, or each object's cheapest.

    An assignment of c columns needs no more than the c cheapest predictions of each object: with any other one, one of
    these is free and no dearer.

    Attributes:
        kept: predictions of each object that are sent; Lq sends all of all.
    """

    layers: int
    predictions: int
    objects: int
    kept: int

    @classmethod
    def plan(cls, layers: int, predictions: int, objects: int, repeat: int) -> "_Transfer":
        kept, many = repeat * objects, predictions * objects > PAIRS_TO_ASSIGN
        return cls(layers, predictions, objects, kept if many and 4 * kept <= predictions else predictions)

    @property
    def is_whole(self) -> bool:
        return self.kept == self.predictions

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.layers, self.predictions, self.objects

    @property
    def size(self) -> int:
        """Numbers to send: all costs, or chosen ones, which predictions they are of, and each layer's extremes."""
        return math.prod(self.shape) if self.is_whole else self.layers * (2 * self.kept * self.objects + 2)

    def write_cheapest(self, cost: Tensor, part: Tensor) -> None:
        """Write the cheapest of ``cost`` into ``part`` (size,)."""
        values, predictions = cost.topk(self.kept, dim=1, largest=False, sorted=False)
        chosen, extremes = part.split((2 * values.numel(), 2 * self.layers))
        costs, numbers = chosen.view(2, *values.shape).unbind()
        costs.copy_(values)
        numbers.view(torch.int32).copy_(predictions)
        # A NaN is both of them.
        torch.stack(cost.flatten(1).aminmax(dim=1), out=extremes.view(2, self.layers))

    def read(self, part: np.ndarray) -> list[_Costs]:
        """Costs by layer from what was sent (size,)."""
        if self.is_whole:
            return [_Costs(layer, None, bool(np.isfinite(layer).all())) for layer in part.reshape(self.shape)]
        chosen, extremes = part[: -2 * self.layers], part[-2 * self.layers :]
        values, numbers = chosen.reshape(2, self.layers, self.kept, self.objects)
        is_finite = np.isfinite(extremes.reshape(2, self.layers)).all(0)
        return [
            _sparse(*layer, is_finite=bool(finite))
            for *layer, finite in zip(values, numbers.view(np.int32), is_finite, strict=True)
        ]


def _sparse(values: np.ndarray, predictions: np.ndarray, *, is_finite: bool) -> _Costs:
    """Costs of chosen predictions, (kept, n) both, each column for one object."""
    rows, where = np.unique(predictions, return_inverse=True)
    matrix = np.full((len(rows), values.shape[1]), np.inf, dtype=values.dtype)
    matrix[where.reshape(values.shape), np.arange(values.shape[1])] = values
    return _Costs(matrix, rows, is_finite)


def _assign(costs: Sequence[Sequence[_Costs]], repeat: int) -> list[list[Match]]:
    """Cheapest assignments for the costs of the images of a group, first by layer, then by image."""
    return [[_assign_layer(image, repeat) for image in layer] for layer in zip(*costs, strict=True)]


def _assign_layer(costs: _Costs, repeat: int) -> Match:
    rows, columns = linear_sum_assignment(np.tile(costs.matrix, repeat))
    rows = rows if costs.rows is None else costs.rows[rows]
    return torch.from_numpy(rows), torch.from_numpy(columns % max(1, costs.matrix.shape[1]))


def _check_finite(costs: Sequence[_Costs], group: Predictions, image: int, target: Target) -> None:
    """Keep NaN from scipy, which would not say where it comes from. costs: by layer, of one image."""
    bad_layers = [number for number, cost in enumerate(costs) if not cost.is_finite]
    if not bad_layers:
        return
    layer = bad_layers[0]
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
