"""Which pixels of a canvas and which cells of its feature maps are padding.

Shapes: N images in the top left corners of canvases of (H, W) pixels, L feature maps of (H_l, W_l) cells.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def padding_mask(canvas: Sequence[int], image_sizes: Tensor) -> Tensor:
    """Return the padding of a batch in pixels.

    Args:
        canvas: H and W.
        image_sizes: (N, 2) heights and widths of the images.

    Returns:
        (N, H, W) bool, True = padding.
    """
    height, width = canvas
    rows = torch.arange(height, device=image_sizes.device) >= image_sizes[:, 0, None]
    columns = torch.arange(width, device=image_sizes.device) >= image_sizes[:, 1, None]
    return rows[:, :, None] | columns[:, None, :]


def padding_masks(
    canvas: Sequence[int], image_sizes: Tensor, spatial_shapes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Return the padding of every feature map: nearest samples of :func:`padding_mask`, as the official code.

    Args:
        canvas: H and W.
        image_sizes: (N, 2) heights and widths of the images.
        spatial_shapes: L pairs (H_l, W_l).

    Returns:
        L masks (N, H_l, W_l) bool, True = padding.
    """
    mask = padding_mask(canvas, image_sizes).float()[None]
    return [F.interpolate(mask, size=shape)[0].bool() for shape in spatial_shapes]
