"""The Deformable DETR meta-architecture.

Shapes: Ld decoder layers, N images, Lq queries, K classes, S encoder cells, C hidden width.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..data.dataset_dict import describe_image
from ..data.images import check_format
from ..layers import PositionEmbeddingSine
from ..layers.precision import at_least_float32, wide
from .backbone import canvas_divisibility, project_node
from .criterion import SetCriterion
from .detections import Detections, select_detections, to_instances
from .geometry import Geometry, get_geometry
from .matcher import HungarianMatcher, Target
from .padding import padding_masks
from .step_weights import ready_weights
from .transformer import DeformableTransformer, TransformerOutput

# Prior probability of every class at initialisation (focal loss paper, section 4.1).
PRIOR_PROBABILITY = 0.01


class MLP(nn.Module):
    """Linear layers with ReLU between them; (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


@META_ARCH_REGISTRY.register()
class DeformableDETR(nn.Module):
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
        super().__init__()
        _check_positive(num_classes=num_classes, num_queries=num_queries, test_topk_per_image=test_topk_per_image)
        _check_levels(backbone, transformer)
        check_format(input_format, "INPUT.FORMAT (the model's input_format)")
        self.backbone = backbone
        self.position_embedding = position_embedding
        self.transformer = transformer
        self.criterion = criterion
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.test_topk_per_image = test_topk_per_image
        self.size_divisibility = _common_multiple(size_divisibility, canvas_divisibility(backbone))
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std)).view(-1, 1, 1), persistent=False)
        self.query_embed = None
        if not transformer.two_stage:
            self.query_embed = nn.Embedding(num_queries, 2 * transformer.d_model)
        self.class_embed = self._replicate_head(self._build_class_head())
        self.bbox_embed = self._replicate_head(MLP(transformer.d_model, transformer.d_model, 4, 3))
        self._init_box_heads()

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = project_node(cfg)
        backbone = build_backbone(cfg)
        matcher = HungarianMatcher(
            cost_class=node.COST_CLASS,
            cost_bbox=node.COST_L1,
            cost_giou=node.COST_GIOU,
            focal_alpha=node.FOCAL_ALPHA,
        )
        return {
            "backbone": backbone,
            "position_embedding": PositionEmbeddingSine(node.HIDDEN_DIM),
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
            "num_classes": node.NUM_CLASSES,
            "num_queries": node.NUM_QUERIES,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "size_divisibility": node.SIZE_DIVISIBILITY,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; points and boxes are float32 in half precision models too."""
        return self.transformer.level_embed.dtype

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Train or detect, in Detectron2's standard format.

        Args:
            batched_inputs: per image "image" (3, H, W) in ``input_format``, range 0-255; for training "instances" with
                ``gt_boxes`` (xyxy pixels of "image") and ``gt_classes``; for inference optionally "height" and
                "width", the size in which boxes are wanted.

        Returns:
            In training mode the weighted losses of :class:`SetCriterion`; in evaluation mode per image
            ``{"instances": Instances(pred_boxes, scores, pred_classes)}``, best first.

        Raises:
            ValueError: on ground truth that cannot be trained on, naming file, rule and value.
        """
        images = self.preprocess_image(batched_inputs)
        if not self.training:
            outputs = self.predict(images, all_proposals=False)
            return self.inference(outputs["pred_logits"][-1], outputs["pred_boxes"][-1], images, batched_inputs)
        targets = self.prepare_targets(batched_inputs)
        with ready_weights(self):
            outputs = self.predict(images)
        return self.criterion(outputs, targets)

    @torch.no_grad()
    def predict_raw(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """All predictions in evaluation mode, before post-processing.

        Returns:
            "pred_logits" (Ld, N, Lq, K), "pred_boxes" (Ld, N, Lq, 4) cxcywh in [0, 1] relative to each image without
            its padding, and for two-stage models "enc_logits" (N, S, K), "enc_boxes" (N, S, 4).
        """
        was_training = self.training
        self.eval()
        try:
            return self.predict(self.preprocess_image(batched_inputs))
        finally:
            self.train(was_training)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise, then pad with zeros to the largest sides, rounded up to multiples of ``size_divisibility``."""
        images = [self.normalise(x["image"].to(self.device)) for x in batched_inputs]
        return ImageList.from_tensors(images, self.size_divisibility)

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation of every channel: (..., 3, H, W), range 0-255."""
        return (images - at_least_float32(self.pixel_mean)) / at_least_float32(self.pixel_std)

    def prepare_targets(self, batched_inputs: list[dict]) -> list[Target]:
        """Ground truth as "labels" (n,) and "boxes" (n, 4) cxcywh in [0, 1] of the unpadded image, on the device."""
        targets = []
        for x in batched_inputs:
            if "instances" not in x:
                raise ValueError(f'training needs "instances" for every image; {describe_image(x)} has none')
            instances = x["instances"]
            boxes, labels = instances.gt_boxes.tensor, instances.gt_classes
            _check_ground_truth(boxes, labels, self.num_classes, x)
            height, width = instances.image_size
            scale = boxes.new_tensor([width, height, width, height])
            boxes = box_convert(boxes / scale, "xyxy", "cxcywh")
            targets.append({"labels": labels.to(self.device), "boxes": boxes.to(self.device)})
        return targets

    def inference(
        self, logits: Tensor, boxes: Tensor, images: ImageList, batched_inputs: list[dict]
    ) -> list[dict[str, Instances]]:
        """Turn predictions of one layer into detections of the wanted sizes.

        Args:
            logits: (N, Lq, K).
            boxes: (N, Lq, 4) cxcywh in [0, 1].
            images: the batch, for its sizes.
            batched_inputs: as for the model; "height" and "width" are the size in which boxes are wanted.
        """
        boxes, scores, labels, _ = self.select_detections(logits, boxes)
        return to_instances(boxes, scores, labels, wanted_sizes(images, batched_inputs))

    def select_detections(self, logits: Tensor, boxes: Tensor) -> Detections:
        """Select the best ``test_topk_per_image`` of :func:`select_detections`."""
        return select_detections(logits, boxes, self.test_topk_per_image)

    def predict(self, images: ImageList, *, all_proposals: bool = True) -> dict[str, Tensor]:
        """Predict for a batch of :meth:`preprocess_image`, in the model's own mode; see :meth:`predict_padded`."""
        # Tensors themselves while torch.jit traces.
        sizes = torch.stack([torch.as_tensor(size) for size in images.image_sizes]).to(images.tensor.device)
        return self.predict_padded(images.tensor, sizes, all_proposals=all_proposals)

    def predict_padded(self, images: Tensor, image_sizes: Tensor, *, all_proposals: bool = True) -> dict[str, Tensor]:
        """Backbone, transformer and heads on tensors alone, as torch.export needs them.

        Args:
            images: (N, 3, H, W) normalised, with zeros at the padding (bottom and right).
            image_sizes: (N, 2) int64, valid heights and widths.
            all_proposals: also return the two-stage encoder's predictions for every cell, which only training needs.

        Returns:
            What :meth:`predict_raw` documents.
        """
        features = list(self.backbone(images.to(self.dtype)).values())
        geometry = self.get_geometry(images.shape[-2:], image_sizes, features)
        output = self.transform(features, geometry, all_proposals=all_proposals)
        heads = list(self.class_embed)[: len(output.hidden_states)]
        logits = [head(hidden) for head, hidden in zip(heads, output.hidden_states, strict=True)]
        # Stacked even where only the last layer is used, so that no head is ever without a gradient (DDP).
        predictions = {"pred_logits": torch.stack(logits), "pred_boxes": torch.stack(output.boxes)}
        if output.enc_logits is not None:
            predictions |= {"enc_logits": output.enc_logits, "enc_boxes": output.enc_boxes}
        return predictions

    def transform(
        self, features: Sequence[Tensor], geometry: Geometry, *, all_proposals: bool = True
    ) -> TransformerOutput:
        """Run the transformer, with this model's queries and heads, on features of the backbone."""
        return self.transformer(
            features,
            geometry,
            query_embed=None if self.query_embed is None else self.query_embed.weight,
            num_queries=self.num_queries,
            class_embed=self.class_embed,
            bbox_embed=self.bbox_embed,
            all_proposals=all_proposals,
        )

    def get_geometry(self, canvas: Sequence[int], image_sizes: Tensor, features: Sequence[Tensor]) -> Geometry:
        """Masks, positions and reference points of a batch.

        Args:
            canvas: padded height and width.
            image_sizes: (N, 2) valid heights and widths.
            features: of the backbone, for their sizes and dtype.
        """
        masks = padding_masks(canvas, image_sizes, [tuple(feature.shape[-2:]) for feature in features])
        return get_geometry(
            masks,
            [self.position_embedding(mask) for mask in masks],
            dtype=wide(features[0].dtype),
            two_stage=self.transformer.two_stage,
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


def wanted_sizes(images: ImageList, batched_inputs: Sequence[dict]) -> list[tuple[int, int]]:
    """Heights and widths in which boxes are wanted: "height" and "width" of the inputs, or those of the images."""
    return [
        (x.get("height", int(height)), x.get("width", int(width)))
        for x, (height, width) in zip(batched_inputs, images.image_sizes, strict=True)
    ]


def _check_ground_truth(boxes: Tensor, labels: Tensor, num_classes: int, x: dict) -> None:
    """Refuse what would otherwise become a NaN loss or an index error on the device."""
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        raise ValueError(f"gt_classes must be in [0, {num_classes}), got {labels[bad].tolist()} in {describe_image(x)}")
    if not boxes.isfinite().all():
        rows = boxes[~boxes.isfinite().all(dim=1)].tolist()
        raise ValueError(f"gt_boxes must be finite, got {rows} in {describe_image(x)}")
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
    if empty.any():
        raise ValueError(f"gt_boxes (xyxy) must have an area, got {boxes[empty].tolist()} in {describe_image(x)}")


def _check_levels(backbone: Backbone, transformer: DeformableTransformer) -> None:
    channels = [shape.channels for shape in backbone.output_shape().values()]
    expected = [transformer.d_model] * len(transformer.level_embed)
    if channels != expected:
        raise ValueError(
            f"the backbone must output {len(expected)} levels of {transformer.d_model} channels, as the transformer "
            f"expects, got channels {channels}"
        )


def _common_multiple(a: int, b: int) -> int:
    """Return the least common multiple of two divisibilities, of which 0 and 1 ask for nothing."""
    if a < 0:
        raise ValueError(f"size_divisibility must be at least 0, got {a}")
    return math.lcm(max(a, 1), max(b, 1)) if max(a, b) > 1 else 0


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
