"""The deformable transformer: encoder, two-stage proposals, decoder with optional box refinement.

Shapes: N batch, L feature levels of (H_l, W_l) cells, S = sum of H_l*W_l, Lq queries, C = d_model, K classes.
Boxes are cxcywh in [0, 1] relative to the valid (unpadded) part of each image; masks are True at padding.
Behaviour follows the official Deformable DETR; parameter names are its names, so its weights load unchanged.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers import MSDeformAttn
from ..layers.position_encoding import sine_embedding
from ..layers.precision import at_least_float32
from .decoder import DeformableTransformerDecoder, DeformableTransformerDecoderLayer
from .encoder import DeformableTransformerEncoder, DeformableTransformerEncoderLayer
from .geometry import Geometry, flatten_levels
from .proposals import Proposals, propose


class Queries(NamedTuple):
    """What the decoder starts from.

    Attributes:
        content, position: (N, Lq, C).
        reference_points: (N, Lq, 2) centres or (N, Lq, 4) boxes in [0, 1].
    """

    content: Tensor
    position: Tensor
    reference_points: Tensor


class ExtraQueries(NamedTuple):
    """Queries of ground truth that go before those of the model; see :mod:`.denoising`.

    Attributes:
        content: (N, P, C).
        boxes: (N, P, 4) in [0, 1], which become reference points as they are.
    """

    content: Tensor
    boxes: Tensor


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
        extra_queries: ExtraQueries | None = None,
        attn_mask: Tensor | None = None,
    ) -> TransformerOutput:
        """Run encoder and decoder.

        Args:
            features: L maps (N, C, H_l, W_l).
            geometry: of the batch.
            query_embed: (Lq, 2C), position before content; None for two-stage.
            num_queries: proposals that two-stage keeps; fewer where the image has fewer cells.
            class_embed, bbox_embed: a head per decoder layer, plus the encoder's as the last one for two-stage.
            all_proposals: return the encoder's predictions; without, boxes are computed for the best proposals alone.
            extra_queries: for two-stage; they come first in the output, before the queries of the proposals.
            attn_mask: (Lq, Lq) bool over all queries, a row for each that looks, True where it must not see.

        Raises:
            ValueError: on ``extra_queries`` without two stages.
        """
        src = flatten_levels(features)
        pos = geometry.positions if geometry.has_level_embed else self.add_level_embed(geometry)
        memory = self.encoder(src, pos, geometry)

        proposals = None
        if self.two_stage:
            proposals = self._propose(memory, geometry, class_embed[-1], bbox_embed[-1], num_queries, all_proposals)
            queries = self._queries_at(proposals.boxes, extra_queries)
        elif extra_queries is not None:
            raise ValueError("extra_queries have boxes as reference points, which needs two_stage; it is False")
        else:
            queries = self._learned_queries(query_embed, src.shape[0])
        hidden_states, boxes = self.decoder(
            *queries,
            memory,
            geometry=geometry,
            bbox_embed=list(bbox_embed)[: self.num_decoder_layers],
            # A decoder of one's own need not know of masks.
            **({} if attn_mask is None else {"attn_mask": attn_mask}),
        )
        if proposals is None:
            return TransformerOutput(hidden_states, boxes)
        return TransformerOutput(hidden_states, boxes, proposals.all_logits, proposals.all_boxes)

    def add_level_embed(self, geometry: Geometry) -> Tensor:
        """Positions (N, S, C) with the embedding of each cell's level, in the weights' dtype."""
        cells = [height * width for height, width in geometry.spatial_shapes]
        levels = zip(geometry.positions.split(cells, dim=1), self.level_embed, strict=True)
        return torch.cat([position + embed for position, embed in levels], dim=1).to(self.level_embed.dtype)

    def _propose(
        self,
        memory: Tensor,
        geometry: Geometry,
        class_head: nn.Module,
        bbox_head: nn.Module,
        num_queries: int,
        all_proposals: bool,
    ) -> Proposals:
        """Take proposals from the memory (N, S, C)."""
        anchors = geometry.proposals.expand(memory.shape[0], -1, -1)
        unusable = anchors[..., :1].isinf()
        features = self.enc_output_norm(self.enc_output(memory.masked_fill(unusable, 0.0)))
        return propose(
            features,
            anchors,
            class_head=class_head,
            bbox_head=bbox_head,
            num_queries=num_queries,
            all_proposals=all_proposals,
        )

    def _queries_at(self, boxes: Tensor, extra: ExtraQueries | None) -> Queries:
        """Queries of boxes (N, Lq, 4), after the extra ones."""
        if extra is not None:
            boxes = torch.cat((extra.boxes, boxes), dim=1)
        position, content = self._embed_boxes(boxes)
        if extra is not None:
            content = torch.cat((extra.content, content[:, extra.content.shape[1] :]), dim=1)
        return Queries(content, position, boxes)

    def _learned_queries(self, query_embed: Tensor, images: int) -> Queries:
        """Queries of (Lq, 2C), position before content, the same in all images."""
        position, content = query_embed.expand(images, -1, -1).split(self.d_model, dim=-1)
        return Queries(content, position, at_least_float32(self.reference_points(position)).sigmoid())

    def _embed_boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Turn boxes (N, Lq, 4) in [0, 1] into query positions and contents, (N, Lq, C) each."""
        encoded = sine_embedding(boxes * 2 * torch.pi, self.d_model // 2).flatten(-2)
        encoded = encoded.to(self.pos_trans.weight.dtype)
        return self.pos_trans_norm(self.pos_trans(encoded)).split(self.d_model, dim=-1)
