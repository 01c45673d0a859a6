"""The encoder of the deformable transformer.

Shapes: N batch, L feature levels of (H_l, W_l) cells, S = sum of H_l*W_l, C = d_model. Masks are True at padding.
"""

from torch import Tensor, nn

from ..layers import Dropout, MSDeformAttn
from ..layers.tuned import in_slices, relu_and_dropout
from .geometry import Geometry
from .layer_stack import LayerSource, run_layer, stack_layers
from .reference_points import SpatialShapes


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, post-norm, without a ``forward``: kinds of attention differ in it.

    Args:
        self_attn: the attention, (N, S, C) -> (N, S, C).
        d_model, dim_feedforward: widths C and of the network.
        dropout: dropout probability.
    """

    def __init__(self, self_attn: nn.Module, *, d_model: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.dropout1 = Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout2 = Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout3 = Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

    def _after_attention(self, src: Tensor, attended: Tensor) -> Tensor:
        """(N, S, C) of the layer's input and of what it attends to -> (N, S, C)."""
        src = self.norm1(src + self.dropout1(attended))
        return in_slices(self._feed_forward, src)

    def _feed_forward(self, src: Tensor) -> Tensor:
        """(..., C) -> (..., C), row by row."""
        expanded = self.linear2(relu_and_dropout(self.linear1(src), self.dropout2))
        return self.norm2(src + self.dropout3(expanded))


class DeformableTransformerEncoderLayer(EncoderLayer):
    """Deformable self-attention and feed-forward network, post-norm."""

    def __init__(
        self,
        *,
        d_model: int = 256,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
    ) -> None:
        attention = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        super().__init__(attention, d_model=d_model, dim_feedforward=dim_feedforward, dropout=dropout)

    def forward(
        self,
        src: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """src, pos: (N, S, C); reference_points: (N, S, L, 2); padding_mask: (N, S). Returns (N, S, C)."""
        attended = self.self_attn(src + pos, reference_points, src, spatial_shapes, padding_mask)
        return self._after_attention(src, attended)


class DeformableTransformerEncoder(nn.Module):
    """A stack of encoder layers in which every cell attends around its own centre in all levels.

    Args:
        layer: has the ``forward`` of :class:`DeformableTransformerEncoderLayer`; or a function that makes one.
        num_layers: copies of ``layer``, or calls of the function.
        activation_checkpoint: keep only the input of every layer for the backward pass, and compute the layer a
            second time there.
    """

    def __init__(self, layer: LayerSource, num_layers: int = 6, *, activation_checkpoint: bool = False) -> None:
        super().__init__()
        self.layers = stack_layers(layer, num_layers)
        self.activation_checkpoint = activation_checkpoint

    def forward(self, src: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
        """src, pos: (N, S, C). Returns memory (N, S, C)."""
        points, shapes, mask = geometry.reference_points, geometry.spatial_shapes, geometry.padding_mask
        for layer in self.layers:
            src = run_layer(layer, src, pos, points, shapes, mask, recompute=self.activation_checkpoint)
        return src
