"""What the transformer needs to know about a batch besides its features: it depends on sizes of images alone.

Shapes: N images, L feature levels of (H_l, W_l) cells, S = sum of H_l*W_l, C hidden width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers import PositionEmbeddingSine
from .cells import SpatialShapes, get_cells
from .reference_points import gen_encoder_proposals, get_encoder_reference_points, get_valid_ratios


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
        hidden_cells: (N, S) bool, cells whose proposals rank last and are seen by no other query; None for none.
        has_level_embed: whether ``positions`` hold the transformer's ``level_embed`` too.
    """

    spatial_shapes: SpatialShapes
    valid_sizes: Tensor
    valid_ratios: Tensor
    padding_mask: Tensor | None
    positions: Tensor
    reference_points: Tensor
    proposals: Tensor | None
    hidden_cells: Tensor | None = None
    has_level_embed: bool = False


def get_geometry(
    spatial_shapes: SpatialShapes,
    valid_sizes: Tensor,
    position_embedding: nn.Module,
    *,
    two_stage: bool,
    hide_padding: bool = False,
) -> Geometry:
    """Compute a batch's geometry.

    Args:
        spatial_shapes: L pairs (H_l, W_l).
        valid_sizes: (N, L, 2) unpadded cells as (w, h). Points and proposals have their dtype: float32, or float64 for
            a model in float64. Half precision cannot tell the cells of a large map apart.
        position_embedding: encodes a padding mask (N, H_l, W_l) as (N, C, H_l, W_l); of a
            :class:`PositionEmbeddingSine` the encodings of all levels come in one piece.
        two_stage: with proposals.
        hide_padding: padding is ``hidden_cells``.
    """
    cells = get_cells(spatial_shapes, valid_sizes)
    index, extent = cells.centers + 0.5, valid_sizes[:, cells.level]
    padding_mask = (index > extent).any(-1)
    if isinstance(position_embedding, PositionEmbeddingSine):
        positions = position_embedding.encode(index.flip(-1).float(), extent.flip(-1).float())
    else:
        masks = padding_mask.split([height * width for height, width in spatial_shapes], dim=1)
        maps = [mask.unflatten(1, shape) for mask, shape in zip(masks, spatial_shapes, strict=True)]
        positions = flatten_levels([position_embedding(mask) for mask in maps])
    return Geometry(
        spatial_shapes=spatial_shapes,
        valid_sizes=valid_sizes,
        valid_ratios=get_valid_ratios(spatial_shapes, valid_sizes),
        padding_mask=padding_mask,
        positions=positions,
        reference_points=get_encoder_reference_points(spatial_shapes, valid_sizes),
        proposals=gen_encoder_proposals(spatial_shapes, valid_sizes, padding_mask) if two_stage else None,
        hidden_cells=padding_mask if hide_padding else None,
    )


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """L maps (N, C, H_l, W_l) -> (N, S, C)."""
    # Each map is turned before they are joined: the result is contiguous, and so is every sum with it.
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
