"""Multi-scale deformable attention (:paper:`Deformable DETR`, eq. 3): function, module, official-style entry.

Shapes: N batch, S sum of H_l*W_l, Lq queries, M heads, D head dim, C = M*D, L levels, P points.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.init import constant_, xavier_uniform_

from . import _ops, _pytorch  # noqa: F401  (importing _ops registers the op)
from .kept import keep_per_size
from .precision import as_autocast, wide

SpatialShapes = Sequence[Sequence[int]] | Tensor


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples of multi-scale features (eq. 3 without the projections).

    Samples outside a map are 0 (grid_sample with padding "zeros", align_corners=False); a location that is NaN or
    infinite contributes 0 and gets zero gradient. Accumulates in float32 (float64 for float64). Once differentiable.
    On CUDA grad_value is summed in no fixed order unless `torch.use_deterministic_algorithms(True)` is set.

    Args:
        value: (N, S, M, D), levels one after another, each in row-major order; float64, float32, float16, bfloat16.
        spatial_shapes: L pairs (H, W) of ints, or an (L, 2) int64 tensor (on CUDA reading it waits for the device).
        sampling_locations: (N, Lq, M, L, P, 2), (x, y) in [0, 1], (0, 0) = top-left corner of the padded map;
            float32, or value's dtype.
        attention_weights: (N, Lq, M, L, P); float32, or value's dtype.

    Returns:
        (N, Lq, M*D) in value's dtype.

    Raises:
        RuntimeError: sizes, ranks, devices or dtypes do not fit together.
    """
    flat = _flatten_shapes(spatial_shapes)
    return torch.ops.deformable_detr.ms_deform_attn(value, flat, sampling_locations, attention_weights)


def ms_deform_attn_pytorch(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """`ms_deform_attn` written with grid_sample: same arguments, result and errors, on any device, slower."""
    return _pytorch.forward(value, _flatten_shapes(spatial_shapes), sampling_locations, attention_weights)


def decompose_ms_deform_attn(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the same program with the op written out as grid_sample, for runtimes that do not have it, such as ONNX.

    Args:
        program: what torch.export.export returns for a model with the op.

    Returns:
        A program for `torch.onnx.export(program, dynamo=True, opset_version=20)`.
    """
    return program.run_decompositions({torch.ops.deformable_detr.ms_deform_attn.default: _pytorch.forward})


class MSDeformAttnFunction:
    """Stands in for the autograd function of the official CUDA op, as Mask2Former, DINO and others call it.

    In ops/functions/__init__.py of such a project, in place of its own import of the same name:

        from deformable_detr.layers import MSDeformAttnFunction

    and without a fallback around the call in ops/modules/ms_deform_attn.py: this one also runs on the CPU.
    """

    # spatial_shapes and level_start_index of the last call and what they hold: the layers of one forward share them,
    # so a model waits for the device once per forward and not once per layer.
    _last: tuple[weakref.ref, weakref.ref, tuple[int, int] | None, list[int]] | None = None

    @classmethod
    def apply(
        cls,
        value: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """`ms_deform_attn` with the official signature.

        Args:
            value: (N, S, M, D).
            spatial_shapes: (L, 2) int64, (H, W).
            level_start_index: (L,) int64, the running sum of H*W before each level.
            sampling_locations: (N, Lq, M, L, P, 2), (x, y) in [0, 1].
            attention_weights: (N, Lq, M, L, P).
            im2col_step: accepted and ignored; every batch size works.

        Returns:
            (N, Lq, M*D).

        Raises:
            ValueError: level_start_index is not the running sum of H*W.
        """
        flat = cls._read_shapes(spatial_shapes, level_start_index)
        return torch.ops.deformable_detr.ms_deform_attn(value, flat, sampling_locations, attention_weights)

    @classmethod
    def _read_shapes(cls, spatial_shapes: Tensor, level_start_index: Tensor) -> list[int]:
        if torch.compiler.is_compiling():
            return _flatten_shapes(spatial_shapes)
        # Of inference tensors nobody counts the changes: they are read every time.
        counted = not (spatial_shapes.is_inference() or level_start_index.is_inference())
        versions = (spatial_shapes._version, level_start_index._version) if counted else None
        if counted and cls._last is not None:
            shapes_ref, starts_ref, last_versions, flat = cls._last
            if shapes_ref() is spatial_shapes and starts_ref() is level_start_index and last_versions == versions:
                return flat
        numbers = torch.cat([spatial_shapes.flatten(), level_start_index.flatten()]).tolist()
        flat, starts = numbers[: spatial_shapes.numel()], numbers[spatial_shapes.numel() :]
        areas = [h * w for h, w in _pytorch.level_sizes(flat)]
        expected = [sum(areas[:level]) for level in range(len(areas))]
        if starts != expected:
            raise ValueError(f"level_start_index must be {expected} for spatial_shapes {flat}, got {starts}")
        if counted:
            cls._last = (weakref.ref(spatial_shapes), weakref.ref(level_start_index), versions, flat)
        return flat


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention module (section 4.1; parameter names of the official code).

    Args:
        d_model: C, the hidden size.
        n_levels: L.
        n_heads: M; must divide d_model.
        n_points: P, sampled per head and level.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model ({d_model}) must be divisible by n_heads ({n_heads})")
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m looks in direction 2*pi*m/M on the unit square, point p at distance p+1 pixels; uniform weights."""
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2.0 * math.pi / self.n_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        ring = directions[:, None, None, :] * distances[:, None]
        constant_(self.sampling_offsets.weight, 0.0)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.expand(-1, self.n_levels, -1, -1).flatten())
        constant_(self.attention_weights.weight, 0.0)
        constant_(self.attention_weights.bias, 0.0)
        for projection in (self.value_proj, self.output_proj):
            xavier_uniform_(projection.weight)
            constant_(projection.bias, 0.0)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to P points per head and level around its reference point.

        Args:
            query: (N, Lq, C).
            reference_points: (N, Lq, L, 2) points (x, y), or (N, Lq, L, 4) boxes cxcywh, in [0, 1] of the padded map.
            value: (N, S, C), the flattened feature levels.
            spatial_shapes: L pairs (H, W).
            padding_mask: (N, S) bool, True = padding, whose value counts as 0.

        Returns:
            (N, Lq, C).

        Raises:
            ValueError: reference_points or spatial_shapes do not fit n_levels, or last dim is not 2 or 4.
        """
        N, Lq, _ = query.shape
        shapes = _pytorch.level_sizes(_flatten_shapes(spatial_shapes))
        self._check(reference_points, shapes)
        query, value = as_autocast(query), self.value_proj(value)
        if padding_mask is not None:
            # After the projection, so that its bias does not leak into the padding. In place where no gradient is
            # wanted: nobody else has it. With gradients that would cost three copies in the backward pass.
            fill = value.masked_fill if torch.is_grad_enabled() else value.masked_fill_
            value = fill(padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.n_heads, self.d_model // self.n_heads))
        points = (self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).view(N, Lq, self.n_heads, -1)
        # Autocast runs softmax in float32; a model in half precision still gets float32 weights and locations.
        accumulate = wide(query.dtype)
        logits = self.attention_weights(query).view(N, Lq, self.n_heads, -1)
        weights = logits.softmax(-1, dtype=accumulate).view(N, Lq, *points)
        locations = self._sampling_locations(reference_points.to(accumulate), offsets, shapes)
        return self.output_proj(ms_deform_attn(value, shapes, locations.view(N, Lq, *points, 2), weights))

    def _sampling_locations(self, reference_points: Tensor, offsets: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Locations (N, Lq, M, L*P*2) from reference points (N, Lq, L, 2 or 4) and offsets (N, Lq, M, L*P*2)."""
        offsets = offsets.to(reference_points.dtype)
        # In one pass over rows of L*P*2 numbers: broadcasting the last dimension of 2 took five times as long on CPU.
        if reference_points.shape[-1] == 2:  # offsets in pixels of each level
            scale = self._per_point(pixel_sizes(shapes, reference_points))
            return torch.addcmul(self._per_point(reference_points), offsets, scale)
        # Offsets in units of half a box per point; centres and sizes of boxes are repeated in one copy.
        centre, size = self._per_point(reference_points.unflatten(-1, (2, 2)).movedim(-2, 0)).unbind()
        return torch.addcmul(centre, offsets, size, value=0.5 / self.n_points)

    def _per_point(self, per_level: Tensor) -> Tensor:
        """(..., L, 2) -> (..., 1, L*P*2), the same for every head and point."""
        repeated = per_level[..., None, :, None, :].expand(*per_level.shape[:-2], 1, -1, self.n_points, -1)
        return repeated.flatten(-3)

    def _check(self, reference_points: Tensor, shapes: list[tuple[int, int]]) -> None:
        if len(shapes) != self.n_levels:
            raise ValueError(f"spatial_shapes must hold n_levels ({self.n_levels}) pairs, got {shapes}")
        sizes = tuple(reference_points.shape)
        if len(sizes) != 4 or sizes[2] != self.n_levels or sizes[3] not in (2, 4):
            raise ValueError(f"reference_points must be (N, Lq, {self.n_levels}, 2 or 4), got {sizes}")


def _flatten_shapes(spatial_shapes: SpatialShapes) -> list[int]:
    """[(h0, w0), (h1, w1), ...] or an (L, 2) tensor -> [h0, w0, h1, w1, ...]."""
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(f"spatial_shapes must be (L, 2), got {tuple(spatial_shapes.shape)}")
        return spatial_shapes.flatten().tolist()
    flat = [size for h, w in spatial_shapes for size in (h, w)]
    # The tracer behind TorchScript and fvcore's counters hands out tensors for sizes, and lists of ints must hold ints.
    return [int(size) for size in flat] if torch.jit.is_tracing() else flat


def pixel_sizes(shapes: list[tuple[int, int]], like: Tensor) -> Tensor:
    """(L, 2), (1 / W, 1 / H). Kept between calls: building it copies from the host, which waits on CUDA."""
    return _pixel_sizes(tuple(map(tuple, shapes)), like.dtype, like.device)


@keep_per_size(1024)
def _pixel_sizes(shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=dtype, device=device)
    return sizes.clamp(min=1).reciprocal()
