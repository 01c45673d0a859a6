"""The Deformable DETR meta-architecture.

Shapes: Ld decoder layers, N images, Lq queries, K classes, S encoder cells, C hidden width.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from .backbone import project_node
from .classification import FocalClassification
from .criterion import SetCriterion
from .denoising import ContrastiveDenoising, DenoisingQueries, attention_mask
from .detector import SetPredictionDetector, check_levels
from .geometry import Geometry
from .heads import MLP
from .matcher import PaddedTargets, Target
from .transformer import DeformableTransformer, ExtraQueries, TransformerOutput

# Prior probability of every class at initialisation (focal loss paper, section 4.1).
PRIOR_PROBABILITY = 0.01


@META_ARCH_REGISTRY.register()
class DeformableDETR(SetPredictionDetector):
    """Deformable DETR (arXiv 2010.04159) for Detectron2's trainers and evaluators.

    Args:
        backbone: gives L maps of ``transformer.d_model`` channels, finest first, such as ``MultiScaleBackbone``.
        position_embedding: encodes a padding mask (N, H, W) as (N, C, H, W).
        transformer: encoder and decoder; decides about box refinement and two-stage.
        criterion: training losses.
        num_classes: K, class outputs. There is no background output.
        num_queries: Lq, detections per image before selection; two-stage: proposals kept.
        num_queries_test: as many in evaluation mode, the first of learned ones; 0 for ``num_queries``.
        shared_heads: one class and one box head for all decoder layers also where boxes are refined (DINO); the
            encoder has its own. Without refinement they are always shared.
        num_one2many_queries: further queries that are decoded beside the others in training, where many of them are
            matched with each object (H-DETR, arXiv 2207.13080); two-stage: the proposals next in rank.
        denoising: makes queries of ground truth that are decoded beside the others in training (DINO, arXiv
            2203.03605); for two-stage.
        test_topk_per_image: detections returned per image, 100 in the official evaluation.
        size_divisibility: pad batches to multiples of so many pixels, beyond what the backbone needs; 0 for the
            official canvas. Where all strides divide the canvas, an image's padding masks do not depend on it.
        padding_invariant: compute the same for an image whatever the canvas around it and the images beside it, see
            :class:`MaskedPadding`; batches are then padded to multiples of the coarsest stride.
        pixel_mean, pixel_std: per channel, in the range and channel order of the input images.
        input_format: channel order the model expects, "RGB" or "BGR"; for Detectron2's predictors and visualisers.

    Raises:
        ValueError: if numbers are out of their range, or parts do not fit each other.
    """

    @configurable
    def __init__(
        self,
        *,
        # Model:
        backbone: Backbone,
        position_embedding: nn.Module,
        transformer: DeformableTransformer,
        num_classes: int,
        num_queries: int = 300,
        num_queries_test: int = 0,
        shared_heads: bool = False,
        # Loss:
        criterion: SetCriterion,
        num_one2many_queries: int = 0,
        denoising: ContrastiveDenoising | None = None,
        # Inference and input:
        test_topk_per_image: int = 100,
        size_divisibility: int = 0,
        padding_invariant: bool = False,
        pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53),
        pixel_std: tuple[float, ...] = (58.395, 57.12, 57.375),
        input_format: str = "RGB",
    ) -> None:
        super().__init__(
            backbone=backbone,
            position_embedding=position_embedding,
            transformer=transformer,
            criterion=criterion,
            num_classes=num_classes,
            num_queries=num_queries,
            test_topk_per_image=test_topk_per_image,
            size_divisibility=size_divisibility,
            padding_invariant=padding_invariant,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            input_format=input_format,
        )
        check_levels(backbone, width=transformer.d_model, levels=len(transformer.level_embed))
        if padding_invariant and transformer.anchor_query_pos:
            raise ValueError("padding_invariant needs anchor_query_pos to be False: its positions are of the canvas")
        if num_one2many_queries < 0:
            raise ValueError(f"num_one2many_queries must be at least 0, got {num_one2many_queries}")
        if denoising is not None:
            _check_denoising(denoising, transformer, num_classes)
        self.num_one2many_queries = num_one2many_queries
        self.denoising = denoising
        self.shared_heads = shared_heads
        self.query_embed = self._build_query_embed(num_queries + num_one2many_queries)
        self.num_queries_test = num_queries_test or num_queries
        _check_num_queries_test(num_queries_test, self.query_embed)
        self.class_embed = self._replicate_head(self._build_class_head())
        self.bbox_embed = self._replicate_head(MLP(transformer.d_model, transformer.d_model, 4, 3))
        self._init_box_heads()

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = project_node(cfg)
        return {
            **super().from_config(cfg),
            "num_queries_test": node.NUM_QUERIES_TEST,
            "shared_heads": node.SHARED_HEADS,
            "transformer": DeformableTransformer(
                d_model=node.HIDDEN_DIM,
                n_heads=node.NHEADS,
                num_encoder_layers=node.ENC_LAYERS,
                num_decoder_layers=node.DEC_LAYERS,
                dim_feedforward=node.DIM_FEEDFORWARD,
                dropout=node.DROPOUT,
                num_feature_levels=node.NUM_FEATURE_LEVELS,
                enc_n_points=node.ENC_N_POINTS,
                dec_n_points=node.DEC_N_POINTS,
                with_box_refine=node.WITH_BOX_REFINE,
                two_stage=node.TWO_STAGE,
                multiclass_proposals=node.MULTICLASS_PROPOSALS,
                mixed_query_selection=node.MIXED_QUERY_SELECTION,
                anchor_query_pos=node.ANCHOR_QUERY_POS,
                look_forward_twice=node.LOOK_FORWARD_TWICE,
                decoder_norm=node.DECODER_NORM,
                inverse_sigmoid_eps=node.INVERSE_SIGMOID_EPS,
                activation_checkpoint=node.ACTIVATION_CHECKPOINT,
            ),
            "criterion": cls.criterion_from_config(
                node,
                FocalClassification(node.FOCAL_ALPHA),
                one2many_repeat=node.ONE2MANY_REPEAT,
                one2many_weight=node.ONE2MANY_WEIGHT,
            ),
            "num_one2many_queries": node.NUM_ONE2MANY_QUERIES,
            "denoising": _denoising_from_config(node),
        }

    @property
    def reads_targets(self) -> bool:
        """Whether there are denoising queries."""
        return self.denoising is not None

    def predict_for_training(
        self, images: ImageList, targets: Sequence[Target] | PaddedTargets | None
    ) -> dict[str, Tensor]:
        """Predict also for denoising and one-to-many queries: "dn_..." and "one2many_..." of :class:`SetCriterion`."""
        if self.denoising is None and not self.num_one2many_queries:
            return self.predict(images)
        denoising = None if self.denoising is None else self.denoising(targets)
        outputs = self.predict(images, denoising=denoising, with_one2many=True)
        kinds = {} if denoising is None else {"dn": denoising.boxes.shape[1]}
        left = outputs["pred_boxes"].shape[2] - sum(kinds.values())
        kinds["pred"] = min(self.num_queries, left)
        if self.num_one2many_queries:
            kinds["one2many"] = left - kinds["pred"]
        split = {
            f"{kind}_{name}": part
            for name in ("logits", "boxes")
            for kind, part in zip(kinds, outputs[f"pred_{name}"].split(list(kinds.values()), dim=2), strict=True)
        }
        return outputs | split

    def transform(
        self,
        features: Sequence[Tensor],
        geometry: Geometry,
        *,
        all_proposals: bool = True,
        denoising: DenoisingQueries | None = None,
        with_one2many: bool = False,
    ) -> TransformerOutput:
        """Run the transformer; its queries are in the order [denoising | matching | one-to-many]."""
        num_queries = self.num_queries if self.training else self.num_queries_test
        one2many = self.num_one2many_queries if with_one2many else 0
        return self.transformer(
            features,
            geometry,
            query_embed=None if self.query_embed is None else self.query_embed.weight,
            num_queries=num_queries + one2many,
            class_embed=self.class_embed,
            bbox_embed=self.bbox_embed,
            all_proposals=all_proposals,
            extra_queries=None if denoising is None else ExtraQueries(denoising.content, denoising.boxes),
            attn_mask=self._attention_mask(num_queries, one2many, geometry, denoising),
        )

    def _attention_mask(
        self, matching: int, one2many: int, geometry: Geometry, denoising: DenoisingQueries | None
    ) -> Tensor | None:
        if denoising is None and not one2many:
            return None
        if self.transformer.two_stage:
            # There are never more proposals than cells.
            cells = sum(height * width for height, width in geometry.spatial_shapes)
            matching, one2many = min(matching, cells), min(one2many, max(0, cells - matching))
        groups, size = (0, 0) if denoising is None else (denoising.num_groups, denoising.group_size)
        return attention_mask(groups, size, matching, one2many, device=geometry.positions.device)

    def _build_query_embed(self, rows: int) -> nn.Embedding | None:
        """Position and content of learned queries, content alone with mixed query selection, else nothing."""
        transformer = self.transformer
        if not transformer.two_stage:
            return nn.Embedding(rows, 2 * transformer.d_model)
        if not transformer.mixed_query_selection:
            return None
        embed = nn.Embedding(rows, transformer.d_model)
        if transformer.anchor_query_pos:
            # As DINO's code, where it belongs to the transformer, all matrices of which start like this.
            nn.init.xavier_uniform_(embed.weight)
        return embed

    def _build_class_head(self) -> nn.Linear:
        head = nn.Linear(self.transformer.d_model, self.num_classes)
        nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        return head

    def _replicate_head(self, head: nn.Module) -> nn.ModuleList:
        """One head per decoder layer, plus the encoder's as the last one for two-stage.

        Decoder layers share one head unless boxes are refined. The encoder's head is always its own: its channel 0
        means "object", not the first class, unless proposals have classes.
        """
        layers = self.transformer.num_decoder_layers
        own = self.transformer.with_box_refine and not self.shared_heads
        heads = [copy.deepcopy(head) if own else head for _ in range(layers)]
        if self.transformer.two_stage:
            heads.append(copy.deepcopy(head))
        return nn.ModuleList(heads)

    def _init_box_heads(self) -> None:
        """Start every head at its reference: zero deltas, small boxes where the reference has no size."""
        for head in self.bbox_embed:
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        refine = self.transformer.with_box_refine
        if not self.transformer.two_stage and not (refine and self.shared_heads):
            # With refinement only the first layer predicts a size from nothing; the others refine that size, and one
            # head for all would make it smaller in each of them.
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias.data[2:], -2.0)


def _denoising_from_config(node: CfgNode) -> ContrastiveDenoising | None:
    if node.DN_NUMBER == 0:
        return None
    return ContrastiveDenoising(
        dn_number=node.DN_NUMBER,
        num_classes=node.NUM_CLASSES,
        embed_dim=node.HIDDEN_DIM,
        label_noise_ratio=node.DN_LABEL_NOISE_RATIO,
        box_noise_scale=node.DN_BOX_NOISE_SCALE,
        inverse_sigmoid_eps=node.INVERSE_SIGMOID_EPS,
    )


def _check_denoising(denoising: ContrastiveDenoising, transformer: DeformableTransformer, num_classes: int) -> None:
    if not transformer.two_stage:
        raise ValueError("denoising queries have boxes as reference points, which needs two_stage; it is False")
    size, expected = tuple(denoising.label_enc.weight.shape), (num_classes, transformer.d_model)
    if size != expected:
        raise ValueError(f"denoising must have (num_classes, embed_dim) {expected}, as the model has, got {size}")
    # A decoder of one's own need not have it.
    eps = getattr(transformer.decoder, "inverse_sigmoid_eps", denoising.inverse_sigmoid_eps)
    if denoising.inverse_sigmoid_eps != eps:
        raise ValueError(
            f"inverse_sigmoid_eps of denoising is {denoising.inverse_sigmoid_eps}, that of the decoder {eps}"
        )


def _check_num_queries_test(number: int, query_embed: nn.Embedding | None) -> None:
    if number < 0:
        raise ValueError(f"num_queries_test must be at least 0, got {number}")
    if query_embed is not None and number > query_embed.num_embeddings:
        raise ValueError(
            f"num_queries_test ({number}) must be at most the number of learned queries ({query_embed.num_embeddings})"
        )
