"""Layers that need torch alone: the deformable attention op and the position encoding."""

from .ms_deform_attn import (
    MSDeformAttn,
    MSDeformAttnFunction,
    decompose_ms_deform_attn,
    ms_deform_attn,
    ms_deform_attn_pytorch,
)
from .position_encoding import PositionEmbeddingSine

__all__ = [
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "PositionEmbeddingSine",
    "decompose_ms_deform_attn",
    "ms_deform_attn",
    "ms_deform_attn_pytorch",
]
