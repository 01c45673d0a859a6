"""What the transformer needs to know about a batch besides its features: it depends on sizes of images alone.

Shapes: N images, L feature levels of (H_l, W_l) cells, S = sum of H_l*W_l, C hidden width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference_points import (
    SpatialShapes,
    gen_encoder_proposals,
    get_encoder_reference_points,
    get_valid_ratios,
    get_valid_sizes,
)


class Geometry(NamedTuple):
    """Where the cells of a batch are; see :func:`get_geometry`. N may be 1 for all images.

    Attributes:
        spatial_shapes: L pairs (H_l, W_l).
        valid_sizes: (N, L, 2) unpadded cells as (w, h).
        valid_ratios: (N, L, 2) unpadded share of each level as (w, h).
        padding_mask: (N, S) bool, True = padding; None where there is none.
        positions: (N, S, C) encodings.
        reference_points: (N, S, L, 2) cell centres in [0, 1] of each level's padded map.
        proposals: (N, S, 4) in logit space, cxcywh, infinite where there is none; None without two stages.
        has_level_embed: whether ``positions`` hold the transformer's ``level_embed`` too.
    """

    spatial_shapes: SpatialShapes
    valid_sizes: Tensor
    valid_ratios: Tensor
    padding_mask: Tensor | None
    positions: Tensor
    reference_points: Tensor
    proposals: Tensor | None
    has_level_embed: bool = False


def get_geometry(
    masks: Sequence[Tensor], positions: Sequence[Tensor], *, dtype: torch.dtype, two_stage: bool
) -> Geometry:
    """Compute a batch's geometry.

    Args:
        masks: L masks (N, H_l, W_l) bool, True = padding.
        positions: L encodings (N, C, H_l, W_l).
        dtype: of points and proposals: float32, or float64 for a model in float64. Half precision cannot tell the
            cells of a large map apart.
        two_stage: with proposals.
    """
    spatial_shapes = [tuple(mask.shape[-2:]) for mask in masks]
    padding_mask = torch.cat([mask.flatten(1) for mask in masks], dim=1)
    valid_sizes = get_valid_sizes(masks).to(dtype)
    return Geometry(
        spatial_shapes=spatial_shapes,
        valid_sizes=valid_sizes,
        valid_ratios=get_valid_ratios(spatial_shapes, valid_sizes),
        padding_mask=padding_mask,
        positions=flatten_levels(positions),
        reference_points=get_encoder_reference_points(spatial_shapes, valid_sizes),
        proposals=gen_encoder_proposals(spatial_shapes, valid_sizes, padding_mask) if two_stage else None,
    )


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """L maps (N, C, H_l, W_l) -> (N, S, C)."""
    # Each map is turned before they are joined: the result is contiguous, and so is every sum with it.
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
