"""The Deformable DETR meta-architecture.

Shapes: Ld decoder layers, N images, Lq queries, K classes, S encoder cells, C hidden width.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from torch import Tensor, nn

from .backbone import project_node
from .criterion import SetCriterion
from .detector import SetPredictionDetector
from .geometry import Geometry
from .heads import MLP
from .matcher import HungarianMatcher
from .transformer import DeformableTransformer, TransformerOutput

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
        test_topk_per_image: detections returned per image, 100 in the official evaluation.
        size_divisibility: pad batches to multiples of so many pixels, beyond what the backbone needs; 0 for the
            official canvas. Where all strides divide the canvas, an image's padding masks do not depend on it.
        pixel_mean, pixel_std: per channel, in the range and channel order of the input images.
        input_format: channel order the model expects, "RGB" or "BGR"; for Detectron2's predictors and visualisers.
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
        # Loss:
        criterion: SetCriterion,
        # Inference and input:
        test_topk_per_image: int = 100,
        size_divisibility: int = 0,
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
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            input_format=input_format,
        )
        _check_levels(backbone, transformer)
        self.query_embed = None
        if not transformer.two_stage:
            self.query_embed = nn.Embedding(num_queries, 2 * transformer.d_model)
        self.class_embed = self._replicate_head(self._build_class_head())
        self.bbox_embed = self._replicate_head(MLP(transformer.d_model, transformer.d_model, 4, 3))
        self._init_box_heads()

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = project_node(cfg)
        shared = super().from_config(cfg)
        matcher = HungarianMatcher(
            cost_class=node.COST_CLASS,
            cost_bbox=node.COST_L1,
            cost_giou=node.COST_GIOU,
            focal_alpha=node.FOCAL_ALPHA,
        )
        return {
            **shared,
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
                activation_checkpoint=node.ACTIVATION_CHECKPOINT,
            ),
            "criterion": SetCriterion(
                matcher,
                class_weight=node.CLASS_WEIGHT,
                bbox_weight=node.L1_WEIGHT,
                giou_weight=node.GIOU_WEIGHT,
                focal_alpha=node.FOCAL_ALPHA,
                aux_loss=node.AUX_LOSS,
            ),
        }

    def transform(
        self, features: Sequence[Tensor], geometry: Geometry, *, all_proposals: bool = True
    ) -> TransformerOutput:
        return self.transformer(
            features,
            geometry,
            query_embed=None if self.query_embed is None else self.query_embed.weight,
            num_queries=self.num_queries,
            class_embed=self.class_embed,
            bbox_embed=self.bbox_embed,
            all_proposals=all_proposals,
        )

    def _build_class_head(self) -> nn.Linear:
        head = nn.Linear(self.transformer.d_model, self.num_classes)
        nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        return head

    def _replicate_head(self, head: nn.Module) -> nn.ModuleList:
        """One head per decoder layer, plus the encoder's as the last one for two-stage.

        Decoder layers share one head unless boxes are refined. The encoder's head is always its own: its channel 0
        means "object", not the first class.
        """
        layers = self.transformer.num_decoder_layers
        refine = self.transformer.with_box_refine
        heads = [copy.deepcopy(head) if refine else head for _ in range(layers)]
        if self.transformer.two_stage:
            heads.append(copy.deepcopy(head))
        return nn.ModuleList(heads)

    def _init_box_heads(self) -> None:
        """Start every head at its reference: zero deltas, small boxes where the reference has no size."""
        for head in self.bbox_embed:
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        if not self.transformer.two_stage:
            # With refinement only the first layer predicts a size from nothing; the others refine that size.
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias.data[2:], -2.0)


def _check_levels(backbone: Backbone, transformer: DeformableTransformer) -> None:
    channels = [shape.channels for shape in backbone.output_shape().values()]
    expected = [transformer.d_model] * len(transformer.level_embed)
    if channels != expected:
        raise ValueError(
            f"the backbone must output {len(expected)} levels of {transformer.d_model} channels, as the transformer "
            f"expects, got channels {channels}"
        )
