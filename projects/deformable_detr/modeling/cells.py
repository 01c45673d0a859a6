"""The cells of feature maps: numbers that depend on sizes alone, for all levels at once.

Shapes: L feature levels of (H_l, W_l) cells, S = sum of H_l*W_l.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.kept import keep_per_size

SpatialShapes = Sequence[tuple[int, int]]
Shapes = tuple[tuple[int, int], ...]
# Sizes of batches that are remembered: 0.6 MB each at 800 x 1333.
_MAX_SIZES = 64


class Cells(NamedTuple):
    """The cells of all levels, level by level and row by row.

    Attributes:
        level: (S,) int64, the level of each cell.
        centers: (S, 2) in cells of that level, as (x, y).
        sizes: (L, 2) of the levels, as (w, h).
        strides: (S, 1) of each cell's level, in those of the first: each level has twice the stride of the one before.
    """

    level: Tensor
    centers: Tensor
    sizes: Tensor
    strides: Tensor


def get_cells(spatial_shapes: SpatialShapes, like: Tensor) -> Cells:
    """Return the cells of L pairs (H_l, W_l), kept between calls; of the dtype and on the device of ``like``."""
    return _cells(_hashable(spatial_shapes), like.dtype, like.device)


def get_sampled_pixels(canvas: Sequence[int], spatial_shapes: SpatialShapes, device: torch.device) -> Tensor:
    """Return which pixels of a canvas the cells of feature maps stand for, as PyTorch samples the nearest ones.

    Args:
        canvas: H and W.
        spatial_shapes: L pairs (H_l, W_l).

    Returns:
        (L, 2, cells) float32, kept between calls: columns of pixels in [l, 0] and rows in [l, 1], infinite beyond the
        map.
    """
    return _sampled_pixels(tuple(canvas), _hashable(spatial_shapes), device)


@keep_per_size(_MAX_SIZES)
def _cells(spatial_shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Cells:
    heights, widths = torch.tensor(spatial_shapes, device=device).unbind(1)
    ends = (heights * widths).cumsum(0)
    index = torch.arange(sum(height * width for height, width in spatial_shapes), device=device)
    level = (index[:, None] >= ends).sum(1)
    width = widths[level]
    index = index - (ends - heights * widths)[level]
    centers = torch.stack((index % width, index // width), dim=-1).to(dtype) + 0.5
    sizes = torch.stack((widths, heights), dim=-1)
    return Cells(level, centers, sizes.to(dtype), (2**level)[:, None].to(dtype))


@keep_per_size(_MAX_SIZES)
def _sampled_pixels(canvas: tuple[int, int], spatial_shapes: Shapes, device: torch.device) -> Tensor:
    # float32 as in torch.nn.functional.interpolate, whose rounding decides which pixel it is.
    sizes = torch.tensor(spatial_shapes, dtype=torch.float32, device=device).flip(1)[..., None]
    scale = torch.tensor(canvas, dtype=torch.float32, device=device).flip(0)[:, None] / sizes
    index = torch.arange(sum(height + width for height, width in spatial_shapes), device=device)
    return (index * scale).floor().masked_fill(index >= sizes, float("inf"))


def _hashable(spatial_shapes: SpatialShapes) -> Shapes:
    return tuple(tuple(shape) for shape in spatial_shapes)
