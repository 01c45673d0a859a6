"""What all detectors of this project share: images in, matched or selected predictions out.

Shapes: Ld decoder layers, N images, Lq queries, K classes, S encoder cells, C hidden width.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone, build_backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..data.dataset_dict import describe_image
from ..data.images import check_format
from ..layers import PositionEmbeddingSine
from ..layers.precision import at_least_float32, wide
from .backbone import canvas_divisibility, project_node
from .classification import Classification, FocalClassification
from .compilation import compile_for_all_sizes, running_compiled
from .criterion import SetCriterion
from .detections import Detections, to_instances
from .geometry import Geometry, get_geometry
from .matcher import HungarianMatcher, PaddedTargets, Target
from .padding import get_valid_sizes
from .padding_invariance import MaskedPadding, check_invariance
from .proposals import silence
from .step_weights import ready_weights
from .training_graphs import TrainingGraphs, check_recordable
from .transformer import TransformerOutput


class SetPredictionDetector(nn.Module):
    """A detector that predicts a set: backbone, transformer, a class and a box head for every decoder layer.

    A model derives from it, makes ``class_embed`` and ``bbox_embed`` with one head per decoder layer, and says in
    :meth:`transform` how its transformer is run.

    Args:
        backbone: gives L maps of ``transformer.d_model`` channels, finest first, such as ``MultiScaleBackbone``.
        position_embedding: encodes a padding mask (N, H, W) as (N, C, H, W).
        transformer: encoder and decoder.
        criterion: training losses.
        num_classes: K.
        num_queries: Lq, detections per image before selection.
        test_topk_per_image: detections returned per image, 100 in the official evaluation.
        size_divisibility: pad batches to multiples of so many pixels, beyond what the backbone needs; 0 for the
            official canvas. Where all strides divide the canvas, an image's padding masks do not depend on it.
        padding_invariant: compute the same for an image whatever the canvas around it and the images beside it, see
            :class:`MaskedPadding`; batches are then padded to multiples of the coarsest stride.
        pixel_mean, pixel_std: per channel, in the range and channel order of the input images.
        input_format: channel order the model expects, "RGB" or "BGR"; for Detectron2's predictors and visualisers.
    """

    # How the model reads its logits, which its criterion must as well.
    classification_type: type[Classification] = FocalClassification
    class_embed: nn.ModuleList
    bbox_embed: nn.ModuleList

    def __init__(
        self,
        *,
        backbone: Backbone,
        position_embedding: nn.Module,
        transformer: nn.Module,
        criterion: SetCriterion,
        num_classes: int,
        num_queries: int,
        test_topk_per_image: int,
        size_divisibility: int,
        padding_invariant: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        _check_positive(num_classes=num_classes, num_queries=num_queries, test_topk_per_image=test_topk_per_image)
        check_format(input_format, "INPUT.FORMAT (the model's input_format)")
        self.backbone = backbone
        self.position_embedding = position_embedding
        self.transformer = transformer
        self.criterion = criterion
        self.classification = criterion.classification
        if not isinstance(self.classification, self.classification_type):
            raise ValueError(
                f"{type(self).__name__} needs a criterion with a {self.classification_type.__name__}, got "
                f"{self.classification}"
            )
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.test_topk_per_image = test_topk_per_image
        self.size_divisibility = _common_multiple(size_divisibility, canvas_divisibility(backbone))
        self.padding_invariant = padding_invariant
        if padding_invariant:
            check_invariance(backbone)
            coarsest = max(shape.stride for shape in backbone.output_shape().values())
            self.size_divisibility = _common_multiple(self.size_divisibility, coarsest)
        self.input_format = input_format
        self.is_compiled = False
        self.graphs: TrainingGraphs | None = None
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std)).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments that all models read alike; a model adds its transformer and its criterion."""
        node = project_node(cfg)
        return {
            "backbone": build_backbone(cfg),
            "position_embedding": PositionEmbeddingSine(
                node.HIDDEN_DIM, temperature=node.POSITION_TEMPERATURE, offset=node.POSITION_OFFSET
            ),
            "num_classes": node.NUM_CLASSES,
            "num_queries": node.NUM_QUERIES,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "size_divisibility": node.SIZE_DIVISIBILITY,
            "padding_invariant": node.PADDING_INVARIANT,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @staticmethod
    def criterion_from_config(node: CfgNode, classification: Classification, **further: Any) -> SetCriterion:
        """Build matcher and criterion of this project's section of a configuration.

        Args:
            classification: how both read logits.
            further: arguments of the criterion that a model has besides.
        """
        matcher = HungarianMatcher(
            cost_class=node.COST_CLASS,
            cost_bbox=node.COST_L1,
            cost_giou=node.COST_GIOU,
            classification=classification,
        )
        return SetCriterion(
            matcher,
            class_weight=node.CLASS_WEIGHT,
            bbox_weight=node.L1_WEIGHT,
            giou_weight=node.GIOU_WEIGHT,
            aux_loss=node.AUX_LOSS,
            classification=classification,
            **further,
        )

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; points and boxes are float32 in half precision models too."""
        return next(self.transformer.parameters()).dtype

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
        if not self.training:
            images = self.preprocess_image(batched_inputs)
            outputs = self.predict(images, all_proposals=False)
            return self.inference(outputs["pred_logits"][-1], outputs["pred_boxes"][-1], images, batched_inputs)
        targets = self.prepare_targets(batched_inputs)
        if self.graphs is not None and self.graphs.can_run:
            return self.criterion(self.graphs(self, [x["image"] for x in batched_inputs], targets), targets)
        images = self.preprocess_image(batched_inputs)
        with ready_weights(self):
            outputs = self.predict_for_training(images, targets)
        return self.criterion(outputs, targets)

    def compile_for_training(self, *, backend: str = "inductor") -> None:
        """Let the transformer compile in the first training step, as one program for batches of all sizes; in place.

        In evaluation, and in copies of the model, it runs as it is written. The backbone always does: PyTorch's default
        compiler would make another program of it for every canvas (docs/performance.md).

        Raises:
            RuntimeError: if PyTorch is too old.
            ValueError: if the model is ``padding_invariant``.
        """
        if self.padding_invariant:
            raise ValueError("a model that is padding_invariant cannot be compiled for training")
        compile_for_all_sizes(self.transformer, backend=backend)
        self.is_compiled = True

    def record_for_training(self) -> None:
        """Let training record predictions, and their backward pass, as CUDA graphs; see :class:`TrainingGraphs`.

        In evaluation, and in copies of the model, it runs as it is written.

        Raises:
            ValueError: if the model cannot be recorded, naming what stands against it.
        """
        check_recordable(self)
        self.graphs = TrainingGraphs(self)

    @property
    def reads_targets(self) -> bool:
        """Whether :meth:`predict_for_training` makes queries of ground truth."""
        return False

    def predict_for_training(
        self, images: ImageList, targets: Sequence[Target] | PaddedTargets | None
    ) -> dict[str, Tensor]:
        """Predict what the criterion compares with ``targets``; a model may decode more queries, made of these.

        For CUDA graphs ``targets`` are in one piece, and None for a model that does not read them.
        """
        return self.predict(images)

    @torch.no_grad()
    def predict_raw(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """All predictions in evaluation mode, before post-processing.

        Returns:
            "pred_logits" (Ld, N, Lq, K), "pred_boxes" (Ld, N, Lq, 4) cxcywh in [0, 1] relative to each image without
            its padding, and for two-stage models "enc_logits" (N, S, K), "enc_boxes" (N, S, 4). If its proposals have
            classes, "enc_chosen" (N, Lq) are the cells whose proposals became queries, best first.
        """
        was_training = self.training
        self.eval()
        try:
            return self.predict(self.preprocess_image(batched_inputs))
        finally:
            self.train(was_training)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise, then pad with zeros to the largest sides, rounded up to multiples of ``size_divisibility``."""
        images = [self.normalise(x["image"].to(self.device, non_blocking=True)) for x in batched_inputs]
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
            # On the host, where a loader leaves them: no launches, and no waiting for the device.
            boxes, labels = instances.gt_boxes.tensor.numpy(force=True), instances.gt_classes.numpy(force=True)
            _check_ground_truth(boxes, labels, self.num_classes, x)
            height, width = instances.image_size
            low, high = np.split(boxes / np.array([width, height, width, height], dtype=boxes.dtype), 2, axis=1)
            target = {"labels": labels, "boxes": np.concatenate(((low + high) / 2, high - low), axis=1)}
            targets.append({key: torch.from_numpy(a).to(self.device, non_blocking=True) for key, a in target.items()})
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
        """Select the best ``test_topk_per_image`` of what the model's classification selects."""
        return self.classification.select(logits, boxes, self.test_topk_per_image)

    def predict(self, images: ImageList, *, all_proposals: bool = True, **further: Any) -> dict[str, Tensor]:
        """Predict for a batch of :meth:`preprocess_image`, in the model's own mode; see :meth:`predict_padded`."""
        # Tensors themselves while torch.jit traces.
        sizes = torch.stack([torch.as_tensor(size) for size in images.image_sizes]).to(images.tensor.device)
        return self.predict_padded(images.tensor, sizes, all_proposals=all_proposals, **further)

    def predict_padded(
        self, images: Tensor, image_sizes: Tensor, *, all_proposals: bool = True, **further: Any
    ) -> dict[str, Tensor]:
        """Backbone, transformer and heads on tensors alone, as torch.export needs them.

        Args:
            images: (N, 3, H, W) normalised, with zeros at the padding (bottom and right).
            image_sizes: (N, 2) int64, valid heights and widths.
            all_proposals: also return the two-stage encoder's predictions for every cell, which only training needs.
            further: what else the model's :meth:`transform` takes.

        Returns:
            What :meth:`predict_raw` documents.
        """
        with running_compiled(training=self.training) if self.is_compiled else contextlib.nullcontext():
            features = self.extract_features(images.to(self.dtype), image_sizes)
            geometry = self.get_geometry(images.shape[-2:], image_sizes, features)
            output = self.transform(features, geometry, all_proposals=all_proposals, **further)
        heads = list(self.class_embed)[: len(output.hidden_states)]
        logits = [head(hidden) for head, hidden in zip(heads, output.hidden_states, strict=True)]
        # Stacked even where only the last layer is used, so that no head is ever without a gradient (DDP).
        logits = torch.stack(logits)
        if output.of_padding is not None and not self.training:
            logits = silence(logits, output.of_padding)
        predictions = {"pred_logits": logits, "pred_boxes": torch.stack(output.boxes)}
        if output.enc_logits is not None:
            predictions |= {"enc_logits": output.enc_logits, "enc_boxes": output.enc_boxes}
        if output.enc_chosen is not None:
            predictions["enc_chosen"] = output.enc_chosen
        return predictions

    def extract_features(self, images: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        """Maps (N, C, H_l, W_l) of the backbone, finest first.

        Args:
            images: (N, 3, H, W) normalised, zero at the padding.
            image_sizes: (N, 2); None if all images fill the canvas.
        """
        masked = self.padding_invariant and image_sizes is not None
        with MaskedPadding(images.shape[-2:], image_sizes) if masked else contextlib.nullcontext():
            return list(self.backbone(images).values())

    def transform(
        self, features: Sequence[Tensor], geometry: Geometry, *, all_proposals: bool = True
    ) -> TransformerOutput:
        """Run the transformer, with this model's queries and heads, on features of the backbone."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its transformer is run")

    def get_geometry(self, canvas: Sequence[int], image_sizes: Tensor, features: Sequence[Tensor]) -> Geometry:
        """Masks, positions and reference points of a batch.

        Args:
            canvas: padded height and width.
            image_sizes: (N, 2) valid heights and widths.
            features: of the backbone, for their sizes and dtype.
        """
        spatial_shapes = [tuple(feature.shape[-2:]) for feature in features]
        valid_sizes = get_valid_sizes(canvas, image_sizes, spatial_shapes).to(wide(features[0].dtype))
        return get_geometry(
            spatial_shapes,
            valid_sizes,
            self.position_embedding,
            two_stage=self.transformer.two_stage,
            hide_padding=self.padding_invariant,
        )


def wanted_sizes(images: ImageList, batched_inputs: Sequence[dict]) -> list[tuple[int, int]]:
    """Heights and widths in which boxes are wanted: "height" and "width" of the inputs, or those of the images."""
    return [
        (x.get("height", int(height)), x.get("width", int(width)))
        for x, (height, width) in zip(batched_inputs, images.image_sizes, strict=True)
    ]


def _check_ground_truth(boxes: np.ndarray, labels: np.ndarray, num_classes: int, x: dict) -> None:
    """Refuse what would otherwise become a NaN loss or an index error on the device."""
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        raise ValueError(f"gt_classes must be in [0, {num_classes}), got {labels[bad].tolist()} in {describe_image(x)}")
    if not np.isfinite(boxes).all():
        rows = boxes[~np.isfinite(boxes).all(axis=1)].tolist()
        raise ValueError(f"gt_boxes must be finite, got {rows} in {describe_image(x)}")
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    if empty.any():
        raise ValueError(f"gt_boxes (xyxy) must have an area, got {boxes[empty].tolist()} in {describe_image(x)}")


def check_levels(backbone: Backbone, *, width: int, levels: int) -> None:
    """Refuse a backbone whose maps are not those that a transformer expects."""
    channels = [shape.channels for shape in backbone.output_shape().values()]
    expected = [width] * levels
    if channels != expected:
        raise ValueError(
            f"the backbone must output {len(expected)} levels of {width} channels, as the transformer "
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
