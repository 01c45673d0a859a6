"""Overlap of boxes, with x and y side by side: half the operations of torchvision's, and a third in the backward pass.

Boxes are cxcywh in any unit; shapes of corners have the coordinate first.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Corners(NamedTuple):
    """Boxes as their upper left and lower right corners, (2, ...) each, x before y."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, boxes: Tensor) -> "Corners":
        """Return the corners of boxes (..., 4)."""
        centre, size = boxes.movedim(-1, 0).contiguous().split(2)
        return cls(torch.sub(centre, size, alpha=0.5), torch.add(centre, size, alpha=0.5))


def generalized_iou(a: Corners, b: Corners) -> Tensor:
    """Return GIoU (arXiv 1902.09630) of boxes (2, ...) whose shapes broadcast: (...), in [-1, 1]; NaN without area."""
    common = torch.minimum(a.high, b.high) - torch.maximum(a.low, b.low)
    intersection = _area(common.clamp(min=0))
    union = _area(a.high - a.low) + _area(b.high - b.low) - intersection
    hull = _area(torch.maximum(a.high, b.high) - torch.minimum(a.low, b.low))
    return intersection / union - (hull - union) / hull


def _area(sides: Tensor) -> Tensor:
    width, height = sides.unbind()
    return width * height
