"""Where queries look: reference points, proposals and boxes, in the frames of images and of padded feature maps.

Shapes: N batch, L feature levels of (H_l, W_l) cells, S = sum of H_l*W_l, Lq queries.
Everything here is float32, also under autocast and in half precision models, which cannot tell the cells of a large map
apart; float64 stays float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.precision import at_least_float32
from .cells import SpatialShapes, get_cells


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of ``x`` clamped to [0, 1], with numerator and denominator at least ``eps`` (as the official code)."""
    # 1.0 and not 1, for which the translation to ONNX would put a tensor, which is no limit beside a number.
    return (x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0)).log()


def apply_box_deltas(deltas: Tensor, reference_points: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Boxes from head outputs relative to references (paper, appendix A.3 and eq. 8).

    Args:
        deltas: (N, Lq, 4), in logit space.
        reference_points: (N, Lq, 2) centres or (N, Lq, 4) boxes in [0, 1]; centres leave width and height absolute.
        eps: of :func:`inverse_sigmoid`.

    Returns:
        (N, Lq, 4) boxes in [0, 1], float32 (float64 for float64).
    """
    reference = inverse_sigmoid(at_least_float32(reference_points), eps)
    if reference.shape[-1] == 2:
        reference = F.pad(reference, (0, 2))
    return (at_least_float32(deltas) + reference).sigmoid()


def get_valid_ratios(spatial_shapes: SpatialShapes, valid_sizes: Tensor) -> Tensor:
    """Unpadded share of each level, (N, L, 2) as (w, h)."""
    return valid_sizes / get_cells(spatial_shapes, valid_sizes).sizes


def get_encoder_reference_points(spatial_shapes: SpatialShapes, valid_sizes: Tensor) -> Tensor:
    """Cell centres of all levels, in [0, 1] of each target level's *padded* map.

    Args:
        spatial_shapes: L pairs (H, W).
        valid_sizes: (N, L, 2) unpadded cells as (w, h).

    Returns:
        (N, S, L, 2), (x, y).
    """
    centers = get_relative_centers(spatial_shapes, valid_sizes)
    return centers[:, :, None] * get_valid_ratios(spatial_shapes, valid_sizes)[:, None]


def get_relative_centers(spatial_shapes: SpatialShapes, valid_sizes: Tensor) -> Tensor:
    """Cell centres of all levels, (N, S, 2) as (x, y), in [0, 1] of each image without its padding."""
    cells = get_cells(spatial_shapes, valid_sizes)
    return cells.centers / valid_sizes[:, cells.level]


def gen_encoder_proposals(spatial_shapes: SpatialShapes, valid_sizes: Tensor, padding_mask: Tensor) -> Tensor:
    """One anchor-like proposal per encoder cell (two-stage, paper appendix A.4).

    Level l gets squares of side ``0.05 * 2**l`` around its cell centres. Proposals at padding, or with a coordinate
    outside (0.01, 0.99), are +inf in logit space: their boxes become 1 and their features are zeroed by the caller.

    Args:
        spatial_shapes: L pairs (H, W).
        valid_sizes: (N, L, 2) unpadded cells as (w, h).
        padding_mask: (N, S) bool.

    Returns:
        (N, S, 4) proposals in logit space, cxcywh.
    """
    centers = get_relative_centers(spatial_shapes, valid_sizes)
    sides = get_cells(spatial_shapes, valid_sizes).strides * 0.05
    boxes = torch.cat((centers, sides.expand_as(centers)), dim=-1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~padding_mask
    return torch.logit(boxes).masked_fill(~usable[..., None], float("inf"))
