"""Which pixels of a canvas and which cells of its feature maps are padding.

Shapes: N images in the top left corners of canvases of (H, W) pixels, L feature maps of (H_l, W_l) cells.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cells import SpatialShapes, get_sampled_pixels


def padding_mask(canvas: Sequence[int], image_sizes: Tensor) -> Tensor:
    """Return the padding of a batch in pixels.

    Args:
        canvas: H and W.
        image_sizes: (N, 2) heights and widths of the images.

    Returns:
        (N, H, W) bool, True = padding.
    """
    return _beyond(canvas, image_sizes)


def get_valid_sizes(canvas: Sequence[int], image_sizes: Tensor, spatial_shapes: SpatialShapes) -> Tensor:
    """Return how many cells of every feature map are no padding: those whose nearest pixel is not (official code).

    Args:
        canvas: H and W.
        image_sizes: (N, 2) heights and widths of the images.
        spatial_shapes: L pairs (H_l, W_l).

    Returns:
        (N, L, 2) float32 as (w, h).
    """
    pixels = get_sampled_pixels(canvas, spatial_shapes, image_sizes.device)
    return (pixels < image_sizes.flip(1)[:, None, :, None]).sum(-1).float()


def padding_masks(canvas: Sequence[int], image_sizes: Tensor, spatial_shapes: SpatialShapes) -> list[Tensor]:
    """Return the padding of every feature map, as :func:`get_valid_sizes` has it: L masks (N, H_l, W_l) bool."""
    sizes = get_valid_sizes(canvas, image_sizes, spatial_shapes).flip(2).unbind(1)
    return [_beyond(shape, valid) for shape, valid in zip(spatial_shapes, sizes, strict=True)]


def _beyond(shape: Sequence[int], sizes: Tensor) -> Tensor:
    """Where a map of (H, W) is outside of areas of ``sizes`` (N, 2), heights and widths, in its top left corner."""
    height, width = shape
    rows = torch.arange(height, device=sizes.device) >= sizes[:, 0, None]
    columns = torch.arange(width, device=sizes.device) >= sizes[:, 1, None]
    return rows[:, :, None] | columns[:, None, :]
