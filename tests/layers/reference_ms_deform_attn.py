"""Multi-scale deformable attention as loops over single numbers, in float64: slow, and short enough to check by eye."""

import math

import torch
from torch import Tensor


def reference_ms_deform_attn(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Arguments as in `deformable_detr.layers.ms_deform_attn`; returns (N, Lq, M*D) in float64."""
    value, sampling_locations, attention_weights = (
        tensor.detach().double() for tensor in (value, sampling_locations, attention_weights)
    )
    N, _, M, D = value.shape
    _, Lq, _, L, P, _ = sampling_locations.shape
    output = torch.zeros(N, Lq, M, D, dtype=torch.float64)
    starts = [sum(h * w for h, w in spatial_shapes[:level]) for level in range(L)]
    for n, q, m, level, p in torch.cartesian_prod(*(torch.arange(size) for size in (N, Lq, M, L, P))).tolist():
        (h, w), start = spatial_shapes[level], starts[level]
        x, y = sampling_locations[n, q, m, level, p].tolist()
        x, y = x * w - 0.5, y * h - 0.5
        if not (-1 < x < w and -1 < y < h):  # false for NaN too
            continue
        left, top = math.floor(x), math.floor(y)
        for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            if 0 <= row < h and 0 <= column < w:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                output[n, q, m] += attention_weights[n, q, m, level, p] * share * value[n, start + row * w + column, m]
    return output.flatten(2)
