"""DETR's transformer: dense attention among the cells of one feature map (arXiv 2005.12872, appendix A.3).

Shapes: N batch, S cells, Lq queries, C = d_model. Boxes are cxcywh in [0, 1] relative to the valid (unpadded) part of
each image; masks are True at padding. Parameter names are the official ones, so its weights load unchanged.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..layers import Dropout, MultiheadAttention
from ..layers.precision import at_least_float32
from ..layers.tuned import relu_and_dropout
from .encoder import DeformableTransformerEncoder, EncoderLayer
from .geometry import Geometry, flatten_levels
from .layer_stack import LayerSource, check_width, init_matrices, run_layer, stack_layers
from .reference_points import SpatialShapes
from .transformer import TransformerOutput


class DenseEncoderLayer(EncoderLayer):
    """Self-attention among all cells and feed-forward network, post-norm.

    It stands where :class:`DeformableTransformerEncoderLayer` may, in the same stack.
    """

    def __init__(
        self, *, d_model: int = 256, dim_feedforward: int = 2048, dropout: float = 0.1, n_heads: int = 8
    ) -> None:
        attention = MultiheadAttention(d_model, n_heads, dropout=dropout)
        super().__init__(attention, d_model=d_model, dim_feedforward=dim_feedforward, dropout=dropout)

    def forward(
        self,
        src: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """src, pos: (N, S, C); padding_mask: (N, S); where cells are does not matter. Returns (N, S, C)."""
        query = src + pos
        attended = self.self_attn(query, query, src, key_padding_mask=padding_mask, need_weights=False)[0]
        return self._after_attention(src, attended)


class DenseDecoderLayer(nn.Module):
    """Self-attention among queries, attention to all cells, feed-forward network, post-norm."""

    def __init__(
        self, *, d_model: int = 256, dim_feedforward: int = 2048, dropout: float = 0.1, n_heads: int = 8
    ) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, n_heads, dropout=dropout)
        self.dropout1 = Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.multihead_attn = MultiheadAttention(d_model, n_heads, dropout=dropout)
        self.dropout2 = Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout3 = Dropout(dropout)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self, tgt: Tensor, query_pos: Tensor, keys: Tensor, memory: Tensor, padding_mask: Tensor | None
    ) -> Tensor:
        """tgt, query_pos: (N, Lq, C); keys, memory: (N, S, C), with positions and without. Returns (N, Lq, C)."""
        query = tgt + query_pos
        tgt = self.norm1(tgt + self.dropout1(self.self_attn(query, query, tgt, need_weights=False)[0]))
        attended = self.multihead_attn(
            tgt + query_pos, keys, memory, key_padding_mask=padding_mask, need_weights=False
        )[0]
        tgt = self.norm2(tgt + self.dropout2(attended))
        expanded = self.linear2(relu_and_dropout(self.linear1(tgt), self.dropout))
        return self.norm3(tgt + self.dropout3(expanded))


class DenseDecoder(nn.Module):
    """A stack of decoder layers, each of which predicts boxes from nothing: there are no reference points.

    Args:
        layer: has the ``forward`` of :class:`DenseDecoderLayer`, or a function that makes one.
        num_layers: copies of ``layer``, or calls of the function; at least one.
        d_model: width C, of the norm that every layer's output passes on its way to the heads.
        activation_checkpoint: as for the encoder.

    Raises:
        ValueError: if ``num_layers`` is below 1.
    """

    def __init__(
        self, layer: LayerSource, num_layers: int = 6, *, d_model: int = 256, activation_checkpoint: bool = False
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_decoder_layers must be at least 1, got {num_layers}")
        self.layers = stack_layers(layer, num_layers)
        self.norm = nn.LayerNorm(d_model)
        self.activation_checkpoint = activation_checkpoint

    def forward(
        self,
        query_pos: Tensor,
        keys: Tensor,
        memory: Tensor,
        padding_mask: Tensor | None,
        *,
        bbox_embed: Sequence[nn.Module],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode the queries, whose contents start from zero.

        Args:
            query_pos: (N, Lq, C).
            keys, memory: (N, S, C), with positions and without.
            padding_mask: (N, S).
            bbox_embed: a box head per layer, (N, Lq, C) -> (N, Lq, 4).

        Returns:
            Hidden states (N, Lq, C) and boxes (N, Lq, 4) of every layer.
        """
        tgt = torch.zeros_like(query_pos)
        fixed = (query_pos, keys, memory, padding_mask)
        hidden_states, boxes = [], []
        for layer, head in zip(self.layers, bbox_embed, strict=True):
            tgt = run_layer(layer, tgt, *fixed, recompute=self.activation_checkpoint)
            hidden_states.append(self.norm(tgt))
            boxes.append(at_least_float32(head(hidden_states[-1])).sigmoid())
        return hidden_states, boxes


class DenseTransformer(nn.Module):
    """Encoder and decoder of DETR.

    Args:
        d_model: width C, divisible by ``n_heads`` and by 4 (sine and cosine for two axes).
        n_heads: attention heads M.
        num_encoder_layers, num_decoder_layers: depth of the stacks; the decoder needs at least one layer.
        dim_feedforward: hidden width of the feed-forward networks.
        dropout: dropout probability everywhere in the transformer, also of the attention weights.
        activation_checkpoint: keep only the input of every layer for the backward pass and compute the layer a second
            time there: less memory for more time, same gradients.

    Raises:
        ValueError: if sizes do not fit.
    """

    # What tools ask of any transformer.
    with_box_refine = two_stage = False

    def __init__(
        self,
        *,
        d_model: int = 256,
        n_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_width(d_model, n_heads)
        layer = {"d_model": d_model, "dim_feedforward": dim_feedforward, "dropout": dropout, "n_heads": n_heads}
        self.encoder = DeformableTransformerEncoder(
            partial(DenseEncoderLayer, **layer), num_encoder_layers, activation_checkpoint=activation_checkpoint
        )
        self.decoder = DenseDecoder(
            partial(DenseDecoderLayer, **layer),
            num_decoder_layers,
            d_model=d_model,
            activation_checkpoint=activation_checkpoint,
        )
        self.d_model = d_model
        self.num_decoder_layers = num_decoder_layers
        init_matrices(self)

    def forward(
        self, features: Sequence[Tensor], geometry: Geometry, *, query_embed: Tensor, bbox_embed: Sequence[nn.Module]
    ) -> TransformerOutput:
        """Run encoder and decoder.

        Args:
            features: one map (N, C, H, W).
            geometry: of the batch.
            query_embed: (Lq, C) positions.
            bbox_embed: a head per decoder layer.
        """
        src = flatten_levels(features)
        pos = geometry.positions if geometry.has_level_embed else self.add_level_embed(geometry)
        memory = self.encoder(src, pos, geometry)
        query_pos = query_embed.expand(src.shape[0], -1, -1)
        return TransformerOutput(
            *self.decoder(query_pos, memory + pos, memory, geometry.padding_mask, bbox_embed=bbox_embed)
        )

    def add_level_embed(self, geometry: Geometry) -> Tensor:
        """Positions (N, S, C) in the weights' dtype; a single level needs no embedding of its own."""
        return geometry.positions.to(self.decoder.norm.weight.dtype)
