"""Losses of Deformable DETR.

Shapes: Ld decoder layers, N images, Lq queries, K classes, S encoder cells, T matched pairs of a layer.
Boxes are cxcywh in [0, 1] relative to each image without its padding.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss

from .matcher import HungarianMatcher, Match, Target


class SetCriterion(nn.Module):
    """Focal classification, L1 and GIoU losses of predictions matched to ground truth.

    Args:
        matcher: pairs predictions with ground truth.
        class_weight, bbox_weight, giou_weight: weights of the three losses.
        focal_alpha, focal_gamma: of the focal loss.
        aux_loss: also supervise all decoder layers before the last, each with its own matching.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        *,
        class_weight: float = 2.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        self.matcher = matcher
        self.class_weight = class_weight
        self.bbox_weight = bbox_weight
        self.giou_weight = giou_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.aux_loss = aux_loss

    def forward(self, outputs: dict[str, Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Compute all losses.

        Args:
            outputs: "pred_logits" (Ld, N, Lq, K), "pred_boxes" (Ld, N, Lq, 4) and for two-stage models "enc_logits"
                (N, S, K), "enc_boxes" (N, S, 4).
            targets: per image "labels" (n,) int64 in [0, K) and "boxes" (n, 4).

        Returns:
            Weighted scalars "loss_ce", "loss_bbox", "loss_giou" of the last layer, with suffix ``_0`` ... of the
            layers before it and ``_enc`` of the encoder's proposals. Their sum is the training loss.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        num_boxes = self._num_boxes(targets, logits.device)
        first = 0 if self.aux_loss else len(logits) - 1
        losses = self._set_losses(logits[first:], boxes[first:], targets, num_boxes)
        suffixes = [f"_{layer}" for layer in range(first, len(logits) - 1)] + [""]
        if "enc_logits" in outputs:
            # Class-agnostic: every object is class 0. The official code drops this loss when aux_loss is off, which
            # leaves the proposals untrained; here it belongs to two-stage training as such.
            agnostic = [{"labels": torch.zeros_like(t["labels"]), "boxes": t["boxes"]} for t in targets]
            encoder = self._set_losses(outputs["enc_logits"][None], outputs["enc_boxes"][None], agnostic, num_boxes)
            losses = {name: torch.cat((losses[name], encoder[name])) for name in losses}
            suffixes.append("_enc")
        return {
            name + suffix: value
            for name, values in losses.items()
            for suffix, value in zip(suffixes, values.unbind(), strict=True)
        }

    def _set_losses(
        self, logits: Tensor, boxes: Tensor, targets: Sequence[Target], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Losses of Ld stacked predictions (Ld, N, Lq, K) and (Ld, N, Lq, 4), matched layer by layer: (Ld,) each."""
        layers, images, queries = logits.shape[:3]
        logits, boxes = logits.float().flatten(0, 1), boxes.float().flatten(0, 1)
        targets = list(targets) * layers
        matches = self.matcher(logits, boxes, targets)
        flat_queries, labels, target_boxes = _gather_matches(matches, targets, queries)

        one_hot = torch.zeros_like(logits).view(layers * images * queries, -1)
        one_hot[flat_queries, labels] = 1.0
        focal = sigmoid_focal_loss(logits, one_hot.view_as(logits), self.focal_alpha, self.focal_gamma)
        # Every layer has the same number T of matches, so a reshape separates the layers.
        matched = boxes.flatten(0, 1)[flat_queries].view(layers, -1, 4)
        target_boxes = target_boxes.view(layers, -1, 4)
        l1 = F.l1_loss(matched, target_boxes, reduction="none")
        giou = generalized_box_iou_loss(
            box_convert(matched, "cxcywh", "xyxy"), box_convert(target_boxes, "cxcywh", "xyxy"), eps=0.0
        )
        return {
            "loss_ce": self.class_weight * focal.view(layers, -1).sum(1) / num_boxes,
            "loss_bbox": self.bbox_weight * l1.flatten(1).sum(1) / num_boxes,
            "loss_giou": self.giou_weight * giou.sum(1) / num_boxes,
        }

    @staticmethod
    def _num_boxes(targets: Sequence[Target], device: torch.device) -> Tensor:
        """Objects per process over the whole distributed batch, at least 1."""
        count = torch.tensor(float(sum(len(t["labels"]) for t in targets)), device=device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return count.clamp(min=1)


def _gather_matches(
    matches: Sequence[Match], targets: Sequence[Target], num_queries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate matches: indices into the flattened (images * Lq) predictions, labels and boxes of their targets."""
    device = targets[0]["boxes"].device
    queries = torch.cat([rows + image * num_queries for image, (rows, _) in enumerate(matches)]).to(device)
    starts = torch.tensor([0] + [len(t["labels"]) for t in targets]).cumsum(0).tolist()
    objects = torch.cat([columns + start for start, (_, columns) in zip(starts, matches, strict=False)]).to(device)
    labels = torch.cat([t["labels"] for t in targets])[objects]
    boxes = torch.cat([t["boxes"] for t in targets])[objects]
    return queries, labels, boxes.float()
