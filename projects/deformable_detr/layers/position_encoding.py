"""Sine encoding of positions on a padded feature map.

Shapes: N batch, H and W of one feature map.
"""

import math

import torch
from torch import Tensor, nn

from .kept import keep_per_size
from .precision import wide


def sine_embedding(positions: Tensor, num_feats: int, temperature: float = 10000.0) -> Tensor:
    """Encode scalars as interleaved sines and cosines of geometrically spaced frequencies.

    Always computed in float32 at least: in float16 the padded cells overflow to NaN, in bfloat16 valid cells are off by
    0.05.

    Args:
        positions: (...), angles in radians at the highest frequency.
        num_feats: channels per scalar, even.

    Returns:
        (..., num_feats) float32, float64 for float64; channels 2i and 2i+1 are sin and cos of
        ``positions / temperature**(2i/num_feats)``.
    """
    dtype = wide(positions.dtype)
    angles = positions.to(dtype)[..., None] / _wavelengths(num_feats, temperature, dtype, positions.device)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


@keep_per_size(None)
def _wavelengths(num_feats: int, temperature: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return temperature ** (torch.arange(0, num_feats, 2, dtype=dtype, device=device) / num_feats)


class PositionEmbeddingSine(nn.Module):
    """Two-dimensional sine position encoding, normalised to the valid (unpadded) part of each image.

    Args:
        embed_dim: channels of the encoding, divisible by 4; each axis gets half of them.
        temperature: ratio between the slowest and the fastest wavelength; DINO's is 20.
        scale: angle of the far border of the valid area, in radians.
        offset: of the cells' indices, which count from 1. Half a cell down, to the cells' centres, as in the official
            Deformable DETR; 0 in DETR and DINO.

    Raises:
        ValueError: if ``embed_dim`` or ``temperature`` is out of its range.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        *,
        temperature: float = 10000.0,
        scale: float = 2 * math.pi,
        offset: float = -0.5,
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or embed_dim % 4:
            raise ValueError(f"embed_dim must be positive and divisible by 4, got {embed_dim}")
        if not temperature > 0:
            raise ValueError(f"temperature of the position encoding must be above 0, got {temperature}")
        self.embed_dim = embed_dim
        self.temperature = temperature
        self.scale = scale
        self.offset = offset

    def forward(self, padding_mask: Tensor) -> Tensor:
        """Encode every cell of a feature map.

        Args:
            padding_mask: (N, H, W) bool, True = padding.

        Returns:
            (N, embed_dim, H, W) float32, the y channels before the x channels.
        """
        valid = (~padding_mask).float()
        rows, columns = valid.cumsum(1), valid.cumsum(2)
        extent = torch.stack((rows[:, -1:].expand_as(rows), columns[:, :, -1:].expand_as(columns)), dim=-1)
        return self.encode(torch.stack((rows, columns), dim=-1), extent).permute(0, 3, 1, 2)

    def encode(self, index: Tensor, extent: Tensor) -> Tensor:
        """Encode cells.

        Args:
            index: (..., 2) of the cells as (y, x), counted from 1.
            extent: (..., 2) number of unpadded cells along each axis.

        Returns:
            (..., embed_dim) float32, float64 for float64, the y channels before the x channels.
        """
        angle = (index + self.offset) / (extent + 1e-6) * self.scale
        return sine_embedding(angle, self.embed_dim // 2, self.temperature).flatten(-2)

    def extra_repr(self) -> str:
        shape = f"temperature={self.temperature}, scale={self.scale:.4f}, offset={self.offset}"
        return f"embed_dim={self.embed_dim}, {shape}"
