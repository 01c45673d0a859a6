"""The decoder of the deformable transformer.

Shapes: N batch, L feature levels, S cells of all of them, Lq queries, C = d_model. Boxes are cxcywh in [0, 1] relative
to the valid (unpadded) part of each image; masks are True at padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Dropout, MSDeformAttn
from .geometry import Geometry
from .layer_stack import LayerSource, run_layer, stack_layers
from .reference_points import SpatialShapes, apply_box_deltas


class DeformableTransformerDecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention to memory, feed-forward network, post-norm.

    The norms are numbered as in the official code: norm1 follows the cross-attention, norm2 the self-attention.
    """

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
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.dropout2 = Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout3 = Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout4 = Dropout(dropout)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self,
        tgt: Tensor,
        query_pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            tgt, query_pos: (N, Lq, C).
            reference_points: (N, Lq, L, 2 or 4).
            memory: (N, S, C).
            attn_mask: (Lq, Lq) bool, a row for each query that looks, True where it must not see.

        Returns:
            (N, Lq, C).
        """
        query = tgt + query_pos
        attended = self.self_attn(query, query, tgt, need_weights=False, attn_mask=attn_mask)[0]
        tgt = self.norm2(tgt + self.dropout2(attended))
        sampled = self.cross_attn(tgt + query_pos, reference_points, memory, spatial_shapes, padding_mask)
        tgt = self.norm1(tgt + self.dropout1(sampled))
        expanded = self.linear2(self.dropout3(self.linear1(tgt).relu_()))
        return self.norm3(tgt + self.dropout4(expanded))


class DeformableTransformerDecoder(nn.Module):
    """A stack of decoder layers that predicts boxes after each of them.

    With box refinement each layer looks around the (detached) boxes of the layer before; without it, all layers keep
    the initial reference points.

    Args:
        layer: has the ``forward`` of :class:`DeformableTransformerDecoderLayer`, or a function that makes one. It is
            given an ``attn_mask`` only where there is one.
        num_layers: copies of ``layer``, or calls of the function; at least one.
        with_box_refine: iterative bounding box refinement.
        activation_checkpoint: as for the encoder.

    Raises:
        ValueError: if ``num_layers`` is below 1.
    """

    def __init__(
        self,
        layer: LayerSource,
        num_layers: int = 6,
        *,
        with_box_refine: bool = False,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_decoder_layers must be at least 1, got {num_layers}")
        self.layers = stack_layers(layer, num_layers)
        self.with_box_refine = with_box_refine
        self.activation_checkpoint = activation_checkpoint

    def forward(
        self,
        tgt: Tensor,
        query_pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        *,
        geometry: Geometry,
        bbox_embed: Sequence[nn.Module],
        attn_mask: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode the queries.

        Args:
            tgt, query_pos: (N, Lq, C).
            reference_points: (N, Lq, 2 or 4) in [0, 1] of the valid part of each image.
            memory: (N, S, C).
            geometry: of the batch.
            bbox_embed: a box head per layer, (N, Lq, C) -> (N, Lq, 4).
            attn_mask: as for the layers.

        Returns:
            Hidden states (N, Lq, C) and boxes (N, Lq, 4) of every layer.
        """
        ratios = geometry.valid_ratios[:, None]
        fixed = [memory, geometry.spatial_shapes, geometry.padding_mask, *([] if attn_mask is None else [attn_mask])]
        hidden_states, boxes = [], []
        for layer, head in zip(self.layers, bbox_embed, strict=True):
            to_padded = ratios if reference_points.shape[-1] == 2 else torch.cat((ratios, ratios), dim=-1)
            reference_per_level = reference_points[:, :, None] * to_padded
            tgt = run_layer(layer, tgt, query_pos, reference_per_level, *fixed, recompute=self.activation_checkpoint)
            hidden_states.append(tgt)
            boxes.append(apply_box_deltas(head(tgt), reference_points))
            if self.with_box_refine:
                reference_points = boxes[-1].detach()
        return hidden_states, boxes
