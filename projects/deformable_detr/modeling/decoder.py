"""The decoder of the deformable transformer.

Shapes: N batch, L feature levels, S cells of all of them, Lq queries, C = d_model. Boxes are cxcywh in [0, 1] relative
to the valid (unpadded) part of each image; masks are True at padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Dropout, MSDeformAttn, MultiheadAttention
from ..layers.tuned import converted_once, relu_and_dropout
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
        self.self_attn = MultiheadAttention(d_model, n_heads, dropout=dropout)
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
            attn_mask: (Lq, Lq) bool, a row for each query that looks, True where it must not see; (N * M, Lq, Lq)
                where images differ.

        Returns:
            (N, Lq, C).
        """
        query = tgt + query_pos
        attended = self.self_attn(query, query, tgt, need_weights=False, attn_mask=attn_mask)[0]
        tgt = self.norm2(tgt + self.dropout2(attended))
        sampled = self.cross_attn(tgt + query_pos, reference_points, memory, spatial_shapes, padding_mask)
        tgt = self.norm1(tgt + self.dropout1(sampled))
        expanded = self.linear2(relu_and_dropout(self.linear1(tgt), self.dropout3))
        return self.norm3(tgt + self.dropout4(expanded))


class DeformableTransformerDecoder(nn.Module):
    """A stack of decoder layers that predicts boxes after each of them.

    With box refinement each layer looks around the (detached) boxes of the layer before; without it, all layers keep
    the initial reference points.

    Look forward twice (DINO, arXiv 2203.03605, section 3.5) changes gradients alone: a layer predicts boxes relative to
    those of the layer before, not detached. The loss of a layer then trains the deltas of this layer and of the one
    before it, and none that are earlier.

    Args:
        layer: has the ``forward`` of :class:`DeformableTransformerDecoderLayer`, or a function that makes one. It is
            given an ``attn_mask`` only where there is one, and under autocast a ``memory`` in its dtype, into which it
            must not write.
        num_layers: copies of ``layer``, or calls of the function; at least one.
        with_box_refine: iterative bounding box refinement.
        look_forward_twice: needs ``with_box_refine``.
        norm: applied to what the heads see of every layer, (N, Lq, C) -> (N, Lq, C). The next layer, and the deltas
            that move its reference points, are made of the layer's own output: reference points are then other boxes
            than those that are predicted (DINO's code).
        ref_point_head: makes positions of queries for every layer, from its reference boxes (N, Lq, 4) in [0, 1] of the
            padded map of the first level; None: positions are given, and the same in all layers.
        inverse_sigmoid_eps: keeps boxes off 0 and 1 where deltas are added; 1e-3 in DINO.
        activation_checkpoint: as for the encoder.

    Raises:
        ValueError: if ``num_layers`` is below 1, ``inverse_sigmoid_eps`` out of (0, 0.5), or look forward twice without
            refinement.
    """

    def __init__(
        self,
        layer: LayerSource,
        num_layers: int = 6,
        *,
        with_box_refine: bool = False,
        look_forward_twice: bool = False,
        norm: nn.Module | None = None,
        ref_point_head: nn.Module | None = None,
        inverse_sigmoid_eps: float = 1e-5,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_decoder_layers must be at least 1, got {num_layers}")
        if not 0 < inverse_sigmoid_eps < 0.5:
            raise ValueError(f"inverse_sigmoid_eps must be above 0 and below 0.5, got {inverse_sigmoid_eps}")
        if look_forward_twice and not with_box_refine:
            raise ValueError("look_forward_twice needs with_box_refine, which is False")
        self.layers = stack_layers(layer, num_layers)
        self.with_box_refine = with_box_refine
        self.look_forward_twice = look_forward_twice
        self.norm = norm
        self.ref_point_head = ref_point_head
        self.inverse_sigmoid_eps = inverse_sigmoid_eps
        self.activation_checkpoint = activation_checkpoint

    def forward(
        self,
        tgt: Tensor,
        query_pos: Tensor | None,
        reference_points: Tensor,
        memory: Tensor,
        *,
        geometry: Geometry,
        bbox_embed: Sequence[nn.Module],
        attn_mask: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode the queries.

        Args:
            tgt, query_pos: (N, Lq, C); ``query_pos`` is not read where there is a ``ref_point_head``.
            reference_points: (N, Lq, 2 or 4) in [0, 1] of the valid part of each image.
            memory: (N, S, C).
            geometry: of the batch.
            bbox_embed: a box head per layer, (N, Lq, C) -> (N, Lq, 4).
            attn_mask: as for the layers.

        Returns:
            Hidden states (N, Lq, C), normalised, and boxes (N, Lq, 4) of every layer.
        """
        points_to_padded = geometry.valid_ratios[:, None]
        boxes_to_padded = points_to_padded.repeat(1, 1, 1, 2)
        # Otherwise each layer would keep a copy of its own for the backward pass.
        read_memory = converted_once(memory)
        fixed = [geometry.spatial_shapes, geometry.padding_mask, *([] if attn_mask is None else [attn_mask])]
        hidden_states, boxes = [], []
        # What predictions of a layer are relative to: its reference points, with the gradient that they may pass on.
        origin = reference_points
        for layer, head in zip(self.layers, bbox_embed, strict=True):
            # No dictionary of the two: while torch.jit traces, the size is a tensor.
            to_padded = points_to_padded if reference_points.shape[-1] == 2 else boxes_to_padded
            reference_per_level = reference_points[:, :, None] * to_padded
            if self.ref_point_head is not None:
                query_pos = self.ref_point_head(reference_per_level[:, :, 0])
            inputs = (tgt, query_pos, reference_per_level, read_memory(), *fixed)
            tgt = run_layer(layer, *inputs, recompute=self.activation_checkpoint)
            hidden_states.append(tgt if self.norm is None else self.norm(tgt))
            deltas = head(hidden_states[-1])
            boxes.append(apply_box_deltas(deltas, origin, eps=self.inverse_sigmoid_eps))
            if self.with_box_refine and len(boxes) < len(self.layers):
                deltas = deltas if self.norm is None else head(tgt)
                origin = self._next_origin(deltas, reference_points.detach(), boxes[-1])
                reference_points = origin.detach()
        return hidden_states, boxes

    def _next_origin(self, deltas: Tensor, reference_points: Tensor, boxes: Tensor) -> Tensor:
        """Boxes (N, Lq, 4) that the next layer refines: ``boxes`` again, unless norm or gradients make a difference."""
        if self.norm is None and not (self.look_forward_twice and torch.is_grad_enabled()):
            return boxes.detach()
        moved = apply_box_deltas(deltas, reference_points, eps=self.inverse_sigmoid_eps)
        return moved if self.look_forward_twice else moved.detach()
