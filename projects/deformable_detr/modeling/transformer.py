"""The deformable transformer: encoder, two-stage proposals, decoder with optional box refinement.

Shapes: N batch, L feature levels of (H_l, W_l) cells, S = sum of H_l*W_l, Lq queries, C = d_model, K classes.
Boxes are cxcywh in [0, 1] relative to the valid (unpadded) part of each image; masks are True at padding.
Behaviour follows the official Deformable DETR; parameter names are its names, so its weights load unchanged.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import Dropout, MSDeformAttn
from ..layers.position_encoding import sine_embedding
from ..layers.precision import at_least_float32
from ..layers.tuned import in_slices
from .geometry import Geometry, flatten_levels
from .reference_points import SpatialShapes, apply_box_deltas

# A layer, which is copied, or a function that makes one: layers then start with random numbers of their own.
LayerSource = nn.Module | Callable[[], nn.Module]


class TransformerOutput(NamedTuple):
    """What :class:`DeformableTransformer` returns.

    Attributes:
        hidden_states: per decoder layer (N, Lq, C).
        boxes: per decoder layer (N, Lq, 4) in [0, 1].
        enc_logits: (N, S, K), two-stage with ``all_proposals`` only.
        enc_boxes: (N, S, 4) in [0, 1], as enc_logits.
    """

    hidden_states: list[Tensor]
    boxes: list[Tensor]
    enc_logits: Tensor | None = None
    enc_boxes: Tensor | None = None


class DeformableTransformerEncoderLayer(nn.Module):
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
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout2 = Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout3 = Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

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
        src = self.norm1(src + self.dropout1(attended))
        return in_slices(self._feed_forward, src)

    def _feed_forward(self, src: Tensor) -> Tensor:
        """(..., C) -> (..., C), row by row."""
        expanded = self.linear2(self.dropout2(self.linear1(src).relu_()))
        return self.norm2(src + self.dropout3(expanded))


class DeformableTransformerEncoder(nn.Module):
    """A stack of encoder layers in which every cell attends around its own centre in all levels.

    Args:
        layer: has the ``forward`` of :class:`DeformableTransformerEncoderLayer`; or a function that makes one.
        num_layers: copies of ``layer``, or calls of the function.
        activation_checkpoint: see :class:`DeformableTransformer`.
    """

    def __init__(self, layer: LayerSource, num_layers: int = 6, *, activation_checkpoint: bool = False) -> None:
        super().__init__()
        self.layers = _stack(layer, num_layers)
        self.activation_checkpoint = activation_checkpoint

    def forward(self, src: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
        """src, pos: (N, S, C). Returns memory (N, S, C)."""
        points, shapes, mask = geometry.reference_points, geometry.spatial_shapes, geometry.padding_mask
        run = _run_checkpointed if self.activation_checkpoint else _run
        for layer in self.layers:
            src = run(layer, src, pos, points, shapes, mask)
        return src


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
    ) -> Tensor:
        """tgt, query_pos: (N, Lq, C); reference_points: (N, Lq, L, 2 or 4); memory: (N, S, C). Returns (N, Lq, C)."""
        query = tgt + query_pos
        attended = self.self_attn(query, query, tgt, need_weights=False)[0]
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
        layer: has the ``forward`` of :class:`DeformableTransformerDecoderLayer`; or a function that makes one.
        num_layers: copies of ``layer``, or calls of the function; at least one.
        with_box_refine, activation_checkpoint: see :class:`DeformableTransformer`.

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
        self.layers = _stack(layer, num_layers)
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
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode the queries.

        Args:
            tgt, query_pos: (N, Lq, C).
            reference_points: (N, Lq, 2 or 4) in [0, 1] of the valid part of each image.
            memory: (N, S, C).
            geometry: of the batch.
            bbox_embed: a box head per layer, (N, Lq, C) -> (N, Lq, 4).

        Returns:
            Hidden states (N, Lq, C) and boxes (N, Lq, 4) of every layer.
        """
        ratios = geometry.valid_ratios[:, None]
        shapes, mask = geometry.spatial_shapes, geometry.padding_mask
        run = _run_checkpointed if self.activation_checkpoint else _run
        hidden_states, boxes = [], []
        for layer, head in zip(self.layers, bbox_embed, strict=True):
            to_padded = ratios if reference_points.shape[-1] == 2 else torch.cat((ratios, ratios), dim=-1)
            reference_per_level = reference_points[:, :, None] * to_padded
            tgt = run(layer, tgt, query_pos, reference_per_level, memory, shapes, mask)
            hidden_states.append(tgt)
            boxes.append(apply_box_deltas(head(tgt), reference_points))
            if self.with_box_refine:
                reference_points = boxes[-1].detach()
        return hidden_states, boxes


class DeformableTransformer(nn.Module):
    """Encoder, optional two-stage proposal selection, decoder (paper, sections 4 and A).

    Args:
        d_model: width C, divisible by ``n_heads`` and by 4 (sine and cosine for two axes).
        n_heads: attention heads M.
        encoder, decoder: stacks of layers of your own choice; None: made of what follows.
        num_encoder_layers, num_decoder_layers: depth of the stacks; the decoder needs at least one layer.
        dim_feedforward: hidden width of the feed-forward networks.
        dropout: dropout probability everywhere in the transformer.
        num_feature_levels: levels L.
        enc_n_points, dec_n_points: sampling points per head and level.
        with_box_refine: iterative bounding box refinement.
        two_stage: queries come from the encoder's highest scored proposals instead of learned embeddings.
        activation_checkpoint: keep only the input of every layer for the backward pass and compute the layer a second
            time there: less memory for more time, same gradients.

    Raises:
        ValueError: if sizes do not fit, or ``decoder.with_box_refine`` is another than ``with_box_refine``.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        d_model: int = 256,
        n_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        num_feature_levels: int = 4,
        enc_n_points: int = 4,
        dec_n_points: int = 4,
        with_box_refine: bool = False,
        two_stage: bool = False,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if d_model % 4 or d_model % n_heads:
            raise ValueError(f"d_model ({d_model}) must be divisible by 4 and by n_heads ({n_heads})")
        layer = {
            "d_model": d_model,
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "n_levels": num_feature_levels,
            "n_heads": n_heads,
        }
        self.encoder = encoder or DeformableTransformerEncoder(
            partial(DeformableTransformerEncoderLayer, **layer, n_points=enc_n_points),
            num_encoder_layers,
            activation_checkpoint=activation_checkpoint,
        )
        self.decoder = decoder or DeformableTransformerDecoder(
            partial(DeformableTransformerDecoderLayer, **layer, n_points=dec_n_points),
            num_decoder_layers,
            with_box_refine=with_box_refine,
            activation_checkpoint=activation_checkpoint,
        )
        if self.decoder.with_box_refine != with_box_refine:
            raise ValueError(
                f"with_box_refine is {with_box_refine} and that of the decoder {self.decoder.with_box_refine}: the box "
                f"heads need them to be the same"
            )
        self.d_model = d_model
        self.num_decoder_layers = len(self.decoder.layers)
        self.with_box_refine = with_box_refine
        self.two_stage = two_stage
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
            self.pos_trans = nn.Linear(2 * d_model, 2 * d_model)
            self.pos_trans_norm = nn.LayerNorm(2 * d_model)
        else:
            self.reference_points = nn.Linear(d_model, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code: Xavier for all matrices, then what attention and embeddings override."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)

    def forward(
        self,
        features: Sequence[Tensor],
        geometry: Geometry,
        *,
        query_embed: Tensor | None,
        num_queries: int,
        class_embed: Sequence[nn.Module],
        bbox_embed: Sequence[nn.Module],
        all_proposals: bool = True,
    ) -> TransformerOutput:
        """Run encoder and decoder.

        Args:
            features: L maps (N, C, H_l, W_l).
            geometry: of the batch.
            query_embed: (Lq, 2C), position before content; None for two-stage.
            num_queries: proposals that two-stage keeps; fewer where the image has fewer cells.
            class_embed, bbox_embed: a head per decoder layer, plus the encoder's as the last one for two-stage.
            all_proposals: return the encoder's predictions; without, boxes are computed for the best proposals alone.
        """
        src = flatten_levels(features)
        pos = geometry.positions if geometry.has_level_embed else self.add_level_embed(geometry)
        memory = self.encoder(src, pos, geometry)

        enc_logits = enc_boxes = None
        if self.two_stage:
            proposals = geometry.proposals.expand(src.shape[0], -1, -1)
            enc_features, enc_logits, best = self._score_proposals(memory, proposals, class_embed[-1], num_queries)
            if all_proposals:
                enc_unact = at_least_float32(bbox_embed[-1](enc_features)) + proposals
                enc_boxes, chosen = enc_unact.sigmoid(), _take(enc_unact, best)
            else:
                enc_logits = None
                chosen = at_least_float32(bbox_embed[-1](_take(enc_features, best))) + _take(proposals, best)
            reference_points = chosen.detach().sigmoid()
            query_pos, tgt = self._embed_proposals(reference_points)
        else:
            query_pos, tgt = query_embed.expand(src.shape[0], -1, -1).split(self.d_model, dim=-1)
            reference_points = at_least_float32(self.reference_points(query_pos)).sigmoid()

        hidden_states, boxes = self.decoder(
            tgt,
            query_pos,
            reference_points,
            memory,
            geometry=geometry,
            bbox_embed=list(bbox_embed)[: self.num_decoder_layers],
        )
        return TransformerOutput(hidden_states, boxes, enc_logits, enc_boxes)

    def add_level_embed(self, geometry: Geometry) -> Tensor:
        """Positions (N, S, C) with the embedding of each cell's level, in the weights' dtype."""
        cells = [height * width for height, width in geometry.spatial_shapes]
        levels = zip(geometry.positions.split(cells, dim=1), self.level_embed, strict=True)
        return torch.cat([position + embed for position, embed in levels], dim=1).to(self.level_embed.dtype)

    def _score_proposals(
        self, memory: Tensor, proposals: Tensor, class_head: nn.Module, num_queries: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, S, C), (N, S, 4) -> features (N, S, C), class logits (N, S, K), indices of the best (N, Lq)."""
        unusable = proposals[..., :1].isinf()
        features = self.enc_output_norm(self.enc_output(memory.masked_fill(unusable, 0.0)))
        logits = class_head(features)
        # The encoder head is trained on "object or not": channel 0 is the objectness, the others are negatives.
        best = logits[..., 0].topk(min(num_queries, logits.shape[1]), dim=1).indices
        return features, logits, best

    def _embed_proposals(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Turn boxes (N, Lq, 4) in [0, 1] into query positions and contents, (N, Lq, C) each."""
        encoded = sine_embedding(boxes * 2 * torch.pi, self.d_model // 2).flatten(-2)
        encoded = encoded.to(self.pos_trans.weight.dtype)
        return self.pos_trans_norm(self.pos_trans(encoded)).split(self.d_model, dim=-1)


def _stack(layer: LayerSource, num_layers: int) -> nn.ModuleList:
    make = partial(copy.deepcopy, layer) if isinstance(layer, nn.Module) else layer
    return nn.ModuleList(make() for _ in range(num_layers))


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (N, S, D) at index (N, Lq) -> (N, Lq, D)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _run(layer: nn.Module, *args: object) -> Tensor:
    return layer(*args)


def _run_checkpointed(layer: nn.Module, *args: object) -> Tensor:
    """Return the output of :func:`_run`; the backward pass computes it again, dropout's random numbers too."""
    if not torch.is_grad_enabled():
        return layer(*args)
    return checkpoint(layer, *args, use_reentrant=False)
