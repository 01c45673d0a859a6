"""The DETR meta-architecture, on which Deformable DETR improves.

Shapes: N images, Lq queries, K classes, C hidden width.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from torch import Tensor, nn

from .backbone import project_node
from .classification import SoftmaxClassification
from .criterion import SetCriterion
from .dense_transformer import DenseTransformer
from .detector import SetPredictionDetector, check_levels
from .geometry import Geometry
from .heads import MLP
from .transformer import TransformerOutput


@META_ARCH_REGISTRY.register()
class DETR(SetPredictionDetector):
    """DETR (arXiv 2005.12872) for Detectron2's trainers and evaluators.

    Args:
        backbone: gives one map of ``transformer.d_model`` channels, such as ``MultiScaleBackbone``.
        position_embedding: encodes a padding mask (N, H, W) as (N, C, H, W).
        transformer: encoder and decoder.
        criterion: training losses, with a :class:`SoftmaxClassification`.
        num_classes: K. Predictions have K + 1 logits, of which the last one is "no object".
        num_queries: Lq, detections per image before selection.
        test_topk_per_image: detections returned per image; all 100 queries in the official evaluation, each once.
        size_divisibility, padding_invariant, pixel_mean, pixel_std, input_format: as of
            :class:`SetPredictionDetector`.

    Raises:
        ValueError: if numbers are out of their range, or parts do not fit each other.
    """

    classification_type = SoftmaxClassification

    @configurable
    def __init__(
        self,
        *,
        # Model:
        backbone: Backbone,
        position_embedding: nn.Module,
        transformer: DenseTransformer,
        num_classes: int,
        num_queries: int = 100,
        # Loss:
        criterion: SetCriterion,
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
        check_levels(backbone, width=transformer.d_model, levels=1)
        width, layers = transformer.d_model, transformer.num_decoder_layers
        self.query_embed = nn.Embedding(num_queries, width)
        # One head of each kind for all layers, under the names that all models of this project have.
        self.class_embed = nn.ModuleList([nn.Linear(width, self.classification.num_outputs(num_classes))] * layers)
        self.bbox_embed = nn.ModuleList([MLP(width, width, 4, 3)] * layers)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = project_node(cfg)
        return {
            **super().from_config(cfg),
            "transformer": DenseTransformer(
                d_model=node.HIDDEN_DIM,
                n_heads=node.NHEADS,
                num_encoder_layers=node.ENC_LAYERS,
                num_decoder_layers=node.DEC_LAYERS,
                dim_feedforward=node.DIM_FEEDFORWARD,
                dropout=node.DROPOUT,
                activation_checkpoint=node.ACTIVATION_CHECKPOINT,
            ),
            "criterion": cls.criterion_from_config(node, SoftmaxClassification(node.EOS_COEF)),
        }

    def transform(
        self, features: Sequence[Tensor], geometry: Geometry, *, all_proposals: bool = True
    ) -> TransformerOutput:
        """Run the transformer with this model's queries and heads; there are no proposals."""
        return self.transformer(
            features, geometry, query_embed=self.query_embed.weight, bbox_embed=list(self.bbox_embed)
        )
