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
from ..layers.precision import at_least_float32
from .decoder import DeformableTransformerDecoder, DeformableTransformerDecoderLayer
from .encoder import DeformableTransformerEncoder, DeformableTransformerEncoderLayer
from .geometry import Geometry, flatten_levels
from .layer_stack import check_width, init_matrices
from .proposals import Proposals, block_padding, propose
from .queries import AnchorPositions, ExtraQueries, Queries, encode_boxes


class TransformerOutput(NamedTuple):
    """What :class:`DeformableTransformer` returns.

    Attributes:
        hidden_states: per decoder layer (N, Lq, C).
        boxes: per decoder layer (N, Lq, 4) in [0, 1].
        enc_logits: (N, S, K), two-stage with ``all_proposals`` only.
        enc_boxes: (N, S, 4) in [0, 1], as enc_logits.
        enc_chosen: (N, Lq), the cells of the proposals, where enc_logits are scores of classes.
        of_padding: (N, Lq) bool, queries that stand for nothing; None where there are none, or nobody minds.
    """

    hidden_states: list[Tensor]
    boxes: list[Tensor]
    enc_logits: Tensor | None = None
    enc_boxes: Tensor | None = None
    enc_chosen: Tensor | None = None
    of_padding: Tensor | None = None


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
        multiclass_proposals: the encoder's head tells classes, as those of the decoder, and proposals are ranked by
            their best class (DINO).
        mixed_query_selection: only positions of queries come from proposals; their contents are learned, one for each
            rank (DINO, arXiv 2203.03605, section 3.4).
        anchor_query_pos: positions of queries are made of their reference boxes anew in every layer (DAB-DETR,
            arXiv 2201.12329; DINO).
        look_forward_twice, inverse_sigmoid_eps: see :class:`DeformableTransformerDecoder`.
        decoder_norm: its ``norm`` is a LayerNorm.
        activation_checkpoint: keep only the input of every layer for the backward pass and compute the layer a second
            time there: less memory for more time, same gradients.

    Raises:
        ValueError: if sizes do not fit, if a switch lacks another that it needs, if a ``decoder`` of one's own works
            in another way than the switches say, or if a stack of one's own lacks ``activation_checkpoint``.
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
        multiclass_proposals: bool = False,
        mixed_query_selection: bool = False,
        anchor_query_pos: bool = False,
        look_forward_twice: bool = False,
        decoder_norm: bool = False,
        inverse_sigmoid_eps: float = 1e-5,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_width(d_model, n_heads)
        switches = {
            "with_box_refine": with_box_refine,
            "anchor_query_pos": anchor_query_pos,
            "look_forward_twice": look_forward_twice,
            "decoder_norm": decoder_norm,
            "inverse_sigmoid_eps": inverse_sigmoid_eps,
        }
        _check_switches(
            two_stage=two_stage,
            multiclass_proposals=multiclass_proposals,
            mixed_query_selection=mixed_query_selection,
            **switches,
        )
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
            look_forward_twice=look_forward_twice,
            norm=nn.LayerNorm(d_model) if decoder_norm else None,
            ref_point_head=AnchorPositions(d_model) if anchor_query_pos else None,
            inverse_sigmoid_eps=inverse_sigmoid_eps,
            activation_checkpoint=activation_checkpoint,
        )
        _check_decoder(self.decoder, switches)
        if activation_checkpoint:
            _check_recomputation(encoder=self.encoder, decoder=self.decoder)
        self.d_model = d_model
        self.n_heads = n_heads
        self.num_decoder_layers = len(self.decoder.layers)
        self.with_box_refine = with_box_refine
        self.two_stage = two_stage
        self.multiclass_proposals = multiclass_proposals
        self.mixed_query_selection = mixed_query_selection
        self.anchor_query_pos = anchor_query_pos
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
        if self.embeds_proposals:
            self.pos_trans = nn.Linear(2 * d_model, 2 * d_model)
            self.pos_trans_norm = nn.LayerNorm(2 * d_model)
        if not two_stage:
            self.reference_points = nn.Linear(d_model, 2)
        self.reset_parameters()

    @property
    def embeds_proposals(self) -> bool:
        """Whether contents or positions of queries are embeddings of proposals."""
        return self.two_stage and not (self.mixed_query_selection and self.anchor_query_pos)

    def reset_parameters(self) -> None:
        """Initialise as the official code: Xavier for all matrices, then what attention and embeddings override."""
        init_matrices(self)
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
            query_embed: (Lq, 2C), position before content; for two-stage (Lq, C), contents by rank, or None.
            num_queries: rows of ``query_embed`` that are used, proposals that two-stage keeps; fewer where the image
                has fewer cells.
            class_embed, bbox_embed: a head per decoder layer, plus the encoder's as the last one for two-stage.
            all_proposals: return the encoder's predictions; without, boxes are computed for the best proposals alone.
            extra_queries: for two-stage; they come first in the output, before the queries of the proposals.
            attn_mask: (Lq, Lq) bool over all queries, a row for each that looks, True where it must not see.

        Raises:
            ValueError: on ``extra_queries`` without two stages.
        """
        memory = self._encode(features, geometry)
        proposals = of_padding = None
        if self.two_stage:
            proposals = self._propose(memory, geometry, class_embed[-1], bbox_embed[-1], num_queries, all_proposals)
            queries = self._queries_at(proposals.boxes, query_embed, extra_queries)
            if geometry.hidden_cells is not None:
                of_padding = geometry.hidden_cells.gather(1, proposals.chosen)
                attn_mask = block_padding(attn_mask, of_padding, num_heads=self.n_heads)
        elif extra_queries is not None:
            raise ValueError("extra_queries have boxes as reference points, which needs two_stage; it is False")
        else:
            queries = self._learned_queries(query_embed[:num_queries], memory.shape[0])
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
        chosen = proposals.chosen if self.multiclass_proposals and all_proposals else None
        return TransformerOutput(hidden_states, boxes, proposals.all_logits, proposals.all_boxes, chosen, of_padding)

    def _encode(self, features: Sequence[Tensor], geometry: Geometry) -> Tensor:
        """Memory (N, S, C) of the encoder, whose inputs nobody holds on to afterwards."""
        pos = geometry.positions if geometry.has_level_embed else self.add_level_embed(geometry)
        return self.encoder(flatten_levels(features), pos, geometry)

    def add_level_embed(self, geometry: Geometry) -> Tensor:
        """Positions (N, S, C) with the embedding of each cell's level, in the weights' dtype."""
        levels = zip(self.level_embed, geometry.spatial_shapes, strict=True)
        rows = [embed.expand(height * width, -1) for embed, (height, width) in levels]
        return (geometry.positions + torch.cat(rows)).to(self.level_embed.dtype)

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
            multiclass=self.multiclass_proposals,
            all_proposals=all_proposals,
            last=geometry.hidden_cells,
        )

    def _queries_at(self, boxes: Tensor, query_embed: Tensor | None, extra: ExtraQueries | None) -> Queries:
        """Queries of proposed boxes (N, Lq, 4), after the extra ones."""
        references = boxes if extra is None else torch.cat((extra.boxes, boxes), dim=1)
        position = content = None
        if self.embeds_proposals:
            position, content = self._embed_boxes(references)
        if self.mixed_query_selection:
            content = query_embed[: boxes.shape[1]].expand(boxes.shape[0], -1, -1)
        elif extra is not None:
            content = content[:, extra.content.shape[1] :]
        if extra is not None:
            content = torch.cat((extra.content, content), dim=1)
        return Queries(content, None if self.anchor_query_pos else position, references)

    def _learned_queries(self, query_embed: Tensor, images: int) -> Queries:
        """Queries of (Lq, 2C), position before content, the same in all images."""
        position, content = query_embed.expand(images, -1, -1).split(self.d_model, dim=-1)
        return Queries(content, position, at_least_float32(self.reference_points(position)).sigmoid())

    def _embed_boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Turn boxes (N, Lq, 4) in [0, 1] into query positions and contents, (N, Lq, C) each."""
        encoded = encode_boxes(boxes, self.d_model).to(self.pos_trans.weight.dtype)
        return self.pos_trans_norm(self.pos_trans(encoded)).split(self.d_model, dim=-1)


# What a switch cannot do without.
_NEEDS = {
    "multiclass_proposals": ("two_stage",),
    "mixed_query_selection": ("two_stage",),
    "anchor_query_pos": ("two_stage", "with_box_refine"),
    "look_forward_twice": ("with_box_refine",),
}


def _check_switches(**switches: bool | float) -> None:
    for name, needed in _NEEDS.items():
        for other in needed if switches[name] else ():
            if not switches[other]:
                raise ValueError(f"{name} needs {other}, which is {switches[other]}")


def _check_decoder(decoder: nn.Module, switches: dict[str, bool | float]) -> None:
    """Refuse a decoder that works in another way than the switches say; one of one's own need not know of them all."""
    found = {
        "with_box_refine": decoder.with_box_refine,
        "anchor_query_pos": getattr(decoder, "ref_point_head", None) is not None,
        "look_forward_twice": getattr(decoder, "look_forward_twice", False),
        "decoder_norm": getattr(decoder, "norm", None) is not None,
        "inverse_sigmoid_eps": getattr(decoder, "inverse_sigmoid_eps", switches["inverse_sigmoid_eps"]),
    }
    for name, value in switches.items():
        if found[name] != value:
            raise ValueError(f"{name} is {value} and that of the decoder {found[name]}: they must be the same")


def _check_recomputation(**stacks: nn.Module) -> None:
    """Refuse stacks of one's own that keep everything although the transformer's switch is on."""
    for name, stack in stacks.items():
        if not getattr(stack, "activation_checkpoint", False):
            raise ValueError(
                f"activation_checkpoint is True and that of the {name} False: {type(stack).__name__} must have it too"
            )
