"""Layers that need torch alone: deformable attention, position encoding, and what is tuned for a device."""

from .attention import MultiheadAttention
from .ms_deform_attn import (
    MSDeformAttn,
    MSDeformAttnFunction,
    decompose_ms_deform_attn,
    ms_deform_attn,
    ms_deform_attn_pytorch,
)
from .position_encoding import PositionEmbeddingSine
from .tuned import Dropout

__all__ = [
    "Dropout",
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "MultiheadAttention",
    "PositionEmbeddingSine",
    "decompose_ms_deform_attn",
    "ms_deform_attn",
    "ms_deform_attn_pytorch",
]
