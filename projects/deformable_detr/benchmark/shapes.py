"""Inputs of ms_deform_attn as real models call it, and how many bytes they move.

Shapes: N batch, S sum of H_l*W_l, Lq queries, M heads, D head dim, L levels, P points.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

R50_LEVELS = ((100, 134), (50, 67), (25, 34), (13, 17))  # strides 8 to 64 of an 800 x 1066 image
R50_1333_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # of an 800 x 1333 image
SQUARE_LEVELS = ((128, 128), (64, 64), (32, 32), (16, 16))  # of a 1024 x 1024 image


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call. Without num_queries there is one query per pixel, as in an encoder."""

    levels: tuple[tuple[int, int], ...]
    num_queries: int | None = None
    M: int = 8
    D: int = 32
    P: int = 4

    @property
    def S(self) -> int:
        return sum(h * w for h, w in self.levels)

    @property
    def Lq(self) -> int:
        return self.num_queries or self.S


SHAPES = {
    "r50_encoder": Shape(R50_LEVELS),
    "r50_decoder": Shape(R50_LEVELS, 300),
    "r50_1333": Shape(R50_1333_LEVELS),
    "r50_1333_decoder": Shape(R50_1333_LEVELS, 300),
    "dino_5scale": Shape(((200, 267), *R50_LEVELS)),
    "dino_decoder": Shape(R50_LEVELS, 900),
    "swin_1024": Shape(SQUARE_LEVELS),
    "mask2former_1024": Shape(SQUARE_LEVELS[:3]),
}


@dataclasses.dataclass
class Inputs:
    """value (N, S, M, D), L (H, W) pairs, locations (N, Lq, M, L, P, 2), weights (N, Lq, M, L, P), (N, Lq, M*D)."""

    value: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    sampling_locations: Tensor
    attention_weights: Tensor
    grad_output: Tensor

    def bytes_once(self, *, backward: bool) -> int:
        """Bytes moved if every tensor is read or written once: nothing can be faster in main memory."""
        tensors = (self.value, self.sampling_locations, self.attention_weights)
        once = sum(tensor.nbytes for tensor in tensors)
        return self.grad_output.nbytes + (2 if backward else 1) * once

    def bytes_gathered(self, *, backward: bool) -> int:
        """Bytes moved if every corner of every point is read, and in the backward pass added to in float32."""
        corners = 4 * self.attention_weights.numel() * self.value.shape[3]
        return corners * (self.value.element_size() + (8 if backward else 0))


def make_inputs(
    shape: Shape, *, batch: int, dtype: torch.dtype, device: str, distribution: str, sigma: float = 2.0
) -> Inputs:
    """Random inputs.

    Args:
        shape: sizes.
        batch: N.
        dtype: of value; locations and weights are float32 (float64 for float64).
        device: where.
        distribution: "grid": around the query's own pixel (a random point for decoders) with normal noise of `sigma`
            pixels of each level, as in a trained model; "uniform": anywhere, the worst case for caches.
        sigma: pixels.
    """
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": torch.promote_types(dtype, torch.float32)}
    N, L, Lq, M, P = batch, len(shape.levels), shape.Lq, shape.M, shape.P
    value = torch.randn(N, shape.S, M, shape.D, **options).to(dtype)
    if distribution == "uniform":
        locations = torch.rand(N, Lq, M, L, P, 2, **options)
    else:
        points = torch.rand(N, Lq, 2, **options) if shape.num_queries else _pixel_centres(shape, value.device)
        sizes = torch.tensor([(w, h) for h, w in shape.levels], device=device).view(L, 1, 2)
        noise = torch.randn(N, Lq, M, L, P, 2, **options) * sigma / sizes
        locations = points.view(-1, Lq, 1, 1, 1, 2).to(noise) + noise
    weights = torch.randn(N, Lq, M, L * P, **options).softmax(-1).view(N, Lq, M, L, P)
    grad_output = torch.randn(N, Lq, M * shape.D, **options).to(dtype)
    return Inputs(value, shape.levels, locations, weights, grad_output)


def _pixel_centres(shape: Shape, device: torch.device) -> Tensor:
    """(S, 2), (x, y) in [0, 1] of every pixel of every level."""
    centres = []
    for h, w in shape.levels:
        y, x = torch.meshgrid(
            (torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w, indexing="ij"
        )
        centres.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(centres)
