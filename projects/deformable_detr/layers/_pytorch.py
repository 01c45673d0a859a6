"""Multi-scale deformable attention in plain PyTorch: the twin of the compiled kernels.

Shapes: N batch, S sum of H_l*W_l, Lq queries, M heads, D head dim, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# A location is clamped to this range of the normalised map: both ends are at least one pixel outside a map of any
# size, where the sample and its gradient are 0. It keeps NaN and infinity out of grid_sample, which would return NaN.
_OUTSIDE = (-2.0, 3.0)


def check_arguments(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    """Raise what the compiled op raises for arguments that do not fit together.

    Args:
        value: (N, S, M, D).
        spatial_shapes: flat h0, w0, h1, w1, ...
        sampling_locations: (N, Lq, M, L, P, 2).
        attention_weights: (N, Lq, M, L, P).

    Raises:
        RuntimeError: naming the argument, the rule and the sizes.
    """
    ranks = (("value", value, "(N, S, M, D)"), ("sampling_locations", sampling_locations, "(N, Lq, M, L, P, 2)"))
    for name, tensor, layout in (*ranks, ("attention_weights", attention_weights, "(N, Lq, M, L, P)")):
        _require(tensor.dim() == layout.count(",") + 1, f"{name} must be {layout}, got {_sizes(tensor)}")
        _require(tensor.is_floating_point(), f"{name} must be floating point, got {tensor.dtype}")
        _require(tensor.device == value.device, f"{name} is on {tensor.device} but value is on {value.device}")
        _require(
            (tensor.dtype == torch.float64) == (value.dtype == torch.float64),
            f"{name} is {tensor.dtype} but value is {value.dtype}; float64 cannot be mixed with other dtypes",
        )
    _require(len(spatial_shapes) % 2 == 0, f"spatial_shapes must hold (H, W) pairs, got {len(spatial_shapes)} numbers")
    N, S, M, _ = value.shape
    L = len(spatial_shapes) // 2
    expected = (N, sampling_locations.shape[1], M, L, sampling_locations.shape[4], 2)
    _require(
        tuple(sampling_locations.shape) == expected,
        f"sampling_locations must be (N, Lq, M, L, P, 2) with N={N}, M={M} (from value) and L={L} "
        f"(from spatial_shapes), got {_sizes(sampling_locations)}",
    )
    _require(
        attention_weights.shape == sampling_locations.shape[:-1],
        f"attention_weights must be (N, Lq, M, L, P) = {list(expected[:-1])} like sampling_locations, "
        f"got {_sizes(attention_weights)}",
    )
    sizes_fit = all(0 <= size < 2**24 for size in spatial_shapes)
    _require(sizes_fit, f"spatial_shapes must hold sizes from 0 to 2^24, got {list(spatial_shapes)}")
    total = sum(h * w for h, w in level_sizes(spatial_shapes))
    _require(total == S, f"spatial_shapes {list(spatial_shapes)} cover {total} positions but value has S={S}")


def level_sizes(spatial_shapes: Sequence[int]) -> list[tuple[int, int]]:
    """Pair up flat h0, w0, h1, w1, ... as [(h0, w0), (h1, w1), ...]."""
    return list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


def forward(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample and sum with grid_sample, in float32 (float64 for float64 input). Arguments as in check_arguments.

    Returns:
        (N, Lq, M*D) in value's dtype. Ordinary autograd works through it.
    """
    check_arguments(value, spatial_shapes, sampling_locations, attention_weights)
    N, _, M, D = value.shape
    Lq = sampling_locations.shape[1]
    compute = _compute_dtype(value)
    weights = _heads_first(attention_weights.to(compute))
    output = value.new_zeros((N * M, D, Lq), dtype=compute)
    for level, _, features, grid in _levels(value, spatial_shapes, sampling_locations):
        sampled = F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        output = output + (sampled * weights[:, None, :, level]).sum(-1)
    return output.view(N, M * D, Lq).transpose(1, 2).contiguous().to(value.dtype)


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, written out because autograd is off inside a dispatcher kernel.

    Args:
        grad_output: (N, Lq, M*D); the rest as in `forward`.

    Returns:
        Gradients of value, sampling_locations and attention_weights, each in its tensor's shape and dtype.
    """
    check_arguments(value, spatial_shapes, sampling_locations, attention_weights)
    N, S, M, D = value.shape
    _, Lq, _, L, P, _ = sampling_locations.shape
    compute = _compute_dtype(value)
    weights = _heads_first(attention_weights.to(compute))
    grad_output = grad_output.to(compute).transpose(1, 2).reshape(N * M, D, Lq, 1)
    grad_value = value.new_zeros((N * M, D, S), dtype=compute)
    grad_grids = value.new_zeros((N * M, Lq, L, P, 2), dtype=compute)
    grad_weights = value.new_zeros((N * M, Lq, L, P), dtype=compute)
    for level, rows, features, grid in _levels(value, spatial_shapes, sampling_locations):
        sampled = F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        grad_weights[:, :, level] = (sampled * grad_output).sum(1)
        grad_features, grad_grids[:, :, level] = torch.ops.aten.grid_sampler_2d_backward(
            grad_output * weights[:, None, :, level], features, grid, 0, 0, False, [True, True]
        )
        grad_value[:, :, rows] = grad_features.flatten(2)
    # Outside the clamped range the clamp has slope 0. The factor 2 is that of grid = 2 * location - 1.
    low, high = _OUTSIDE
    inside = (sampling_locations >= low) & (sampling_locations <= high)
    grad_locations = _queries_first(grad_grids, N, M) * 2
    return (
        grad_value.view(N, M, D, S).permute(0, 3, 1, 2).to(value.dtype).contiguous(),
        torch.where(inside, grad_locations, 0).to(sampling_locations.dtype),
        _queries_first(grad_weights, N, M).to(attention_weights.dtype),
    )


def _levels(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield (level, rows of S, features (N*M, D, H, W), grid (N*M, Lq, P, 2) in [-1, 1]) of each level with pixels."""
    compute = _compute_dtype(value)
    features = value.to(compute).permute(0, 2, 3, 1).flatten(0, 1)
    locations = sampling_locations.to(compute).nan_to_num(nan=_OUTSIDE[0]).clamp(*_OUTSIDE)
    grids = _heads_first(2 * locations - 1)
    start = 0
    for level, (h, w) in enumerate(level_sizes(spatial_shapes)):
        if h * w == 0:
            continue
        rows = slice(start, start + h * w)
        yield level, rows, features[:, :, rows].unflatten(2, (h, w)), grids[:, :, level]
        start += h * w


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _heads_first(tensor: Tensor) -> Tensor:
    """(N, Lq, M, ...) -> (N*M, Lq, ...)."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _queries_first(tensor: Tensor, N: int, M: int) -> Tensor:
    """(N*M, Lq, ...) -> (N, Lq, M, ...)."""
    return tensor.unflatten(0, (N, M)).transpose(1, 2).contiguous()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _sizes(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
