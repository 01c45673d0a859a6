"""One-to-one assignment of predictions to ground truth.

Shapes: N images, Lq predictions per image, K classes, n objects of one image. Boxes are cxcywh in [0, 1].
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou

Target = dict[str, Tensor]
Match = tuple[Tensor, Tensor]


class HungarianMatcher(nn.Module):
    """Cheapest bipartite matching under focal, L1 and GIoU costs (Deformable DETR's variant of DETR eq. 1).

    Args:
        cost_class, cost_bbox, cost_giou: weights of the terms; at least one must not be 0.
        focal_alpha, focal_gamma: of the focal classification cost.
    """

    def __init__(
        self,
        *,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
    ) -> None:
        super().__init__()
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("cost_class, cost_bbox and cost_giou must not all be 0")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    @torch.no_grad()
    def forward(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Target]) -> list[Match]:
        """Match every image on its own.

        Args:
            pred_logits: (N, Lq, K).
            pred_boxes: (N, Lq, 4).
            targets: per image "labels" (n,) int64 in [0, K) and "boxes" (n, 4).

        Returns:
            Per image the indices of matched predictions and of their targets, on the CPU, both of length min(Lq, n).

        Raises:
            FloatingPointError: if a prediction is NaN or infinite, naming the image and what is not finite.
        """
        costs = [
            self.cost_matrix(logits, boxes, target)
            for logits, boxes, target in zip(pred_logits, pred_boxes, targets, strict=True)
        ]
        # All matrices travel in one copy: one device synchronisation for the whole batch.
        flat = torch.cat([cost.flatten() for cost in costs]).cpu()
        matches = []
        for index, cost in enumerate(flat.split([cost.numel() for cost in costs])):
            if not cost.isfinite().all():
                raise FloatingPointError(_explain_non_finite(index, pred_logits, pred_boxes, targets))
            rows, columns = linear_sum_assignment(cost.view(costs[index].shape).numpy())
            matches.append((torch.from_numpy(rows), torch.from_numpy(columns)))
        return matches

    def cost_matrix(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Cost of every pair of one image: logits (Lq, K), boxes (Lq, 4) -> (Lq, n) float32."""
        prob = logits.float()[:, target["labels"]].sigmoid()
        negative = (1 - self.focal_alpha) * prob**self.focal_gamma * -(1 - prob + 1e-8).log()
        positive = self.focal_alpha * (1 - prob) ** self.focal_gamma * -(prob + 1e-8).log()
        boxes, target_boxes = boxes.float(), target["boxes"].float()
        l1 = torch.cdist(boxes, target_boxes, p=1)
        giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(target_boxes, "cxcywh", "xyxy"))
        return self.cost_class * (positive - negative) + self.cost_bbox * l1 - self.cost_giou * giou

    def extra_repr(self) -> str:
        return f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}"


def _explain_non_finite(index: int, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> str:
    parts = {
        "pred_logits": logits[index],
        "pred_boxes": boxes[index],
        "target boxes": targets[index]["boxes"],
    }
    bad = [f"{name} has {int((~t.isfinite()).sum())}" for name, t in parts.items() if not t.isfinite().all()]
    return f"matching costs of image {index} in the batch must be finite; non-finite values: {', '.join(bad)}"
