"""One-to-one assignment of predictions to ground truth.

Shapes: Ld layers, N images, Lq predictions per layer and image, K classes, n objects of one image. Boxes are cxcywh in
[0, 1].
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..layers.precision import at_least_float32
from ..layers.tuned import PAIRS_AT_ONCE, at_once, in_pieces
from .assignment import Costs, Match, Transfer
from .box_overlap import Corners, generalized_iou
from .classification import Classification, FocalClassification

Target = dict[str, Tensor]


class PaddedTargets(NamedTuple):
    """Ground truth of a batch in one piece: nothing about it but its shape needs the host.

    Attributes:
        labels: (N, M) int64, M the objects of the image that has most; 0 for what an image lacks of them.
        boxes: (N, M, 4), float32 (float64 for float64), likewise.
        counts: (N,) int64, objects of each image.
    """

    labels: Tensor
    boxes: Tensor
    counts: Tensor


def pad_targets(targets: Sequence[Target]) -> PaddedTargets:
    """Put the ground truth of a batch together: per image "labels" (n,) int64 and "boxes" (n, 4)."""
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
    boxes = pad_sequence([at_least_float32(target["boxes"]) for target in targets], batch_first=True)
    counts = torch.tensor([len(target["labels"]) for target in targets])
    return PaddedTargets(labels, boxes, counts.to(labels.device, non_blocking=True))


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
        counts = [len(target["labels"]) for target in targets]
        boxes = torch.cat([_by_image(group.boxes) for group in predictions], dim=1)
        costs = self._costs([_by_image(group.logits) for group in predictions], boxes, _Objects.of(targets))
        found = _to_host(costs, counts, predictions)
        for group, by_image in zip(predictions, found, strict=True):
            for image, by_layer in enumerate(by_image):
                _check_finite(by_layer, group, image, targets[image])
        return [
            [[costs.assign(group.repeat) for costs in by_image] for by_image in zip(*by_image_and_layer, strict=True)]
            for group, by_image_and_layer in zip(predictions, found, strict=True)
        ]

    @torch.no_grad()
    def cost_matrix(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Cost of every pair of one image: logits (..., K), boxes (..., 4) -> (..., n) float32."""
        costs = self._costs([logits.flatten(0, -2)[None]], boxes.flatten(0, -2)[None], _Objects.of([target]))
        return costs.view(*boxes.shape[:-1], -1)

    def _costs(self, logits: Sequence[Tensor], boxes: Tensor, objects: "_Objects") -> Tensor:
        """Costs (N, R, n) of all predictions for the objects of their image.

        Args:
            logits: of groups of predictions, one after the other, (N, R of the group, K or 1).
            boxes: (N, R, 4).
            objects: of every image.
        """
        images, count = objects.labels.shape
        costs = torch.empty((*boxes.shape[:2], count), device=boxes.device)
        rows = max(1, at_once(PAIRS_AT_ONCE, boxes.device) // max(1, images * count))
        # Classes group by group, boxes of all groups together: a GPU pays for every operation, a CPU for large pieces.
        for part, of_part in zip(costs.split([x.shape[1] for x in logits], dim=1), logits, strict=True):
            for piece, of_piece in in_pieces(rows, part, of_part):
                piece.copy_(self.classification.cost(of_piece, objects.labels))
        for piece, of_piece in in_pieces(rows, costs, boxes.float()):
            of_boxes = torch.cdist(of_piece, objects.boxes, p=1).mul_(self.cost_bbox).add_(piece, alpha=self.cost_class)
            overlap = generalized_iou(Corners.of(of_piece[:, :, None]), objects.corners)
            torch.sub(of_boxes, overlap, alpha=self.cost_giou, out=piece)
        return costs

    def extra_repr(self) -> str:
        return f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}"


class _Objects(NamedTuple):
    """The objects of N images, of which the one that has most has n; behind those of an image anything may stand.

    Attributes:
        labels: (N, n).
        boxes: (N, n, 4).
        corners: (2, N, 1, n).
    """

    labels: Tensor
    boxes: Tensor
    corners: Corners

    @classmethod
    def of(cls, targets: Sequence[Target]) -> "_Objects":
        counts = [len(target["labels"]) for target in targets]
        labels, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
        if min(counts) == max(counts):
            labels, boxes = labels.unflatten(0, (len(targets), -1)), boxes.unflatten(0, (len(targets), -1))
        else:
            # Of an image without any, the objects of another.
            numbers = np.minimum(np.arange(max(counts)), np.array(counts)[:, None] - 1).clip(0)
            numbers += np.cumsum([0, *counts[:-1]])[:, None]
            chosen = torch.from_numpy(numbers.clip(max=sum(counts) - 1)).to(labels.device, non_blocking=True)
            labels, boxes = labels[chosen], boxes[chosen]
        boxes = boxes.float()
        return cls(labels, boxes, Corners.of(boxes[:, None]))


def _by_image(x: Tensor) -> Tensor:
    """(Ld, N, Lq, C) -> (N, Ld * Lq, C)."""
    return x.transpose(0, 1).flatten(1, 2)


def _to_host(costs: Tensor, counts: Sequence[int], groups: Sequence[Predictions]) -> list[list[list[Costs]]]:
    """Costs (N, R, n) of all groups, by group, image and layer: one copy, the only wait for the device."""
    sizes = [group.boxes.shape[::2] for group in groups]  # Layers and their queries.
    parts = [
        part.unflatten(1, size)
        for part, size in zip(costs.split([math.prod(size) for size in sizes], dim=1), sizes, strict=True)
    ]
    transfers = [
        Transfer.plan(tuple(part.shape), counts, group.repeat) for part, group in zip(parts, groups, strict=True)
    ]
    packed = [transfer.pack(part) for transfer, part in zip(transfers, parts, strict=True)]
    sent = (packed[0] if len(packed) == 1 else torch.cat(packed)).cpu().numpy()
    ends = np.cumsum([len(part) for part in packed])[:-1]
    return [transfer.unpack(part) for transfer, part in zip(transfers, np.split(sent, ends), strict=True)]


def _check_finite(costs: Sequence[Costs], group: Predictions, image: int, target: Target) -> None:
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
