"""Two-stage: boxes that the encoder proposes (paper, appendix A.4).

Shapes: N batch, S cells of all levels, Lq queries, C = d_model, K classes. Boxes are cxcywh in [0, 1] relative to the
valid (unpadded) part of each image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.precision import at_least_float32
from ..layers.tuned import converted_once

# A logit whose sigmoid is 0, and which is finite in float16 too.
_NEVER = -1e4


class Proposals(NamedTuple):
    """What the encoder proposes.

    Attributes:
        boxes: (N, Lq, 4) of the best cells, best first, without gradient.
        chosen: (N, Lq), which cells these are.
        all_logits: (N, S, K) of all cells, if they were asked for.
        all_boxes: (N, S, 4), as all_logits.
    """

    boxes: Tensor
    chosen: Tensor
    all_logits: Tensor | None
    all_boxes: Tensor | None


def propose(
    features: Tensor,
    anchors: Tensor,
    *,
    class_head: nn.Module,
    bbox_head: nn.Module,
    num_queries: int,
    multiclass: bool,
    all_proposals: bool,
    last: Tensor | None = None,
) -> Proposals:
    """Score every cell, and turn the best into boxes.

    Args:
        features: (N, S, C).
        anchors: (N, S, 4) in logit space, cxcywh, infinite where there is none.
        class_head, bbox_head: the encoder's.
        num_queries: boxes to keep; fewer where there are fewer cells.
        multiclass: rank cells by their best class, for which the head must be trained (DINO's code); otherwise it is
            trained on "object or not": channel 0 is the objectness, the others are negatives.
        all_proposals: return the predictions of all cells; without, boxes are computed for the best alone.
        last: (N, S) bool, cells that rank behind all others.
    """
    read_features = converted_once(features)
    logits = class_head(read_features())
    scores = logits.max(dim=-1).values if multiclass else logits[..., 0]
    if last is not None:
        scores = scores.masked_fill(last, -torch.inf)
    best = scores.topk(min(num_queries, logits.shape[1]), dim=1).indices
    if all_proposals:
        boxes = at_least_float32(bbox_head(read_features())) + anchors
        return Proposals(take_rows(boxes, best).detach().sigmoid(), best, logits, boxes.sigmoid())
    chosen = at_least_float32(bbox_head(take_rows(features, best))) + take_rows(anchors, best)
    return Proposals(chosen.detach().sigmoid(), best, None, None)


def block_padding(attn_mask: Tensor | None, of_padding: Tensor, *, num_heads: int) -> Tensor:
    """Hide queries of padding from all others.

    Args:
        attn_mask: (P + Lq, P + Lq) bool, what is hidden besides, a row for each query that looks; P others come first.
        of_padding: (N, Lq) bool.
        num_heads: M.

    Returns:
        (N * M, P + Lq, P + Lq) bool.
    """
    if attn_mask is not None:
        of_padding = F.pad(of_padding, (attn_mask.shape[0] - of_padding.shape[1], 0))
    # None is hidden from itself: a row without anything to see would be NaN.
    itself = torch.eye(of_padding.shape[1], dtype=torch.bool, device=of_padding.device)
    hidden = of_padding[:, None] & ~itself
    hidden = hidden if attn_mask is None else hidden | attn_mask
    return hidden.repeat_interleave(num_heads, dim=0)


def silence(logits: Tensor, of_padding: Tensor) -> Tensor:
    """Logits (..., N, Lq, K) with scores of 0 for the queries that ``of_padding`` (N, Lq) marks."""
    return logits.masked_fill(of_padding[..., None], _NEVER)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows (N, S, D) at index (N, Lq) -> (N, Lq, D)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
