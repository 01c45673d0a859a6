"""What the decoder starts from, and how boxes become positions of queries.

Shapes: N batch, Lq queries, P extra queries, C = d_model. Boxes are cxcywh in [0, 1].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.position_encoding import sine_embedding
from .heads import MLP


class Queries(NamedTuple):
    """What the decoder starts from.

    Attributes:
        content: (N, Lq, C).
        position: (N, Lq, C); None where the decoder makes positions of the reference points.
        reference_points: (N, Lq, 2) centres or (N, Lq, 4) boxes in [0, 1].
    """

    content: Tensor
    position: Tensor | None
    reference_points: Tensor


class ExtraQueries(NamedTuple):
    """Queries of ground truth that go before those of the model.

    Attributes:
        content: (N, P, C).
        boxes: (N, P, 4) in [0, 1], which become reference points as they are.
    """

    content: Tensor
    boxes: Tensor


def encode_boxes(boxes: Tensor, d_model: int) -> Tensor:
    """Sine encodings of the four numbers of boxes, C/2 channels each: (..., 4) -> (..., 2C) float32 or float64."""
    return sine_embedding(boxes * 2 * torch.pi, d_model // 2).flatten(-2)


class AnchorPositions(MLP):
    """Positions of queries from their boxes, by an MLP over sines (DAB-DETR, arXiv 2201.12329, section 4; DINO)."""

    def __init__(self, d_model: int) -> None:
        super().__init__(2 * d_model, d_model, d_model, 2)
        self.d_model = d_model

    def forward(self, boxes: Tensor) -> Tensor:
        """Boxes cxcywh (N, Lq, 4) in [0, 1] of the padded map -> (N, Lq, C)."""
        x, y, w, h = boxes.unbind(-1)
        # y comes before x, as in the encoding of the maps; the two-stage embedding has x first.
        encoded = encode_boxes(torch.stack((y, x, w, h), dim=-1), self.d_model)
        return super().forward(encoded.to(self.layers[0].weight.dtype))
