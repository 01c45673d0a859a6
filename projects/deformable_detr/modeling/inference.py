"""A copy of a model that only detects, with all done once that need not be done for every batch.

Shapes: N images on a canvas of (H, W) pixels, k detections of an image.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.modeling import ResNet
from detectron2.structures import Instances
from torch import Tensor, nn

from ..layers.ms_deform_attn import pixel_sizes
from .cells import get_cells, get_sampled_pixels
from .cuda_graphs import GraphCache, any_has, canvas_of, common_type
from .detections import to_instances
from .detector import SetPredictionDetector
from .frozen_bn import fold_for_good
from .geometry import Geometry
from .padding import padding_mask
from .proposals import silence

# Canvases whose geometry is kept: 12 MB each in bfloat16, 24 in float32, at 800 x 1333.
MAX_GEOMETRIES = 8


def prepare_for_inference(
    model: SetPredictionDetector, *, dtype: torch.dtype | None = None, cuda_graphs: bool | None = None
) -> "PreparedDETR":
    """Return a copy of a model that detects the same, faster, and can do nothing else.

    FrozenBN is multiplied into the convolutions, the weights are held in ``dtype`` and a ResNet's channels last;
    positions, reference points and proposals of batches without padding are kept for each canvas. On CUDA a batch of a
    shape that was seen before is one CUDA graph. Autocast around it has no effect: ``dtype`` says how it computes.

    Args:
        model: stays as it is; the copy does not see later changes of it.
        dtype: of weights and features, by default the model's. Points, boxes and scores are float32 in half precision
            too, and float64 in between for float64; scores and boxes of detections are float32.
        cuda_graphs: record and replay CUDA graphs, by default on CUDA but for a ViT of relative positions, which
            cannot be recorded; see :class:`GraphCache` for when.

    Raises:
        TypeError: if the model is no :class:`SetPredictionDetector`.
        ValueError: on a ``dtype`` that is not floating point, or on ``cuda_graphs`` without CUDA or for such a ViT.
    """
    if not isinstance(model, SetPredictionDetector):
        raise TypeError(f"prepare_for_inference needs a DeformableDETR or a DETR, got {type(model).__name__}")
    dtype = model.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point type, got {dtype}")
    on_cuda = model.device.type == "cuda"
    if cuda_graphs and not on_cuda:
        raise ValueError(f"cuda_graphs needs a model on CUDA, this one is on {model.device}")
    can_record = on_cuda and not any_has(model, "use_rel_pos")
    if cuda_graphs and not can_record:
        raise ValueError(
            "cuda_graphs does not go with a ViT of relative positions (use_rel_pos), whose indices come from the host"
        )
    # Without the criterion, which may be large and is of no use.
    detector = copy.deepcopy(model, {id(model.criterion): None}).eval().requires_grad_(False)
    # Folded before it is rounded; and the pixels' mean is not rounded at all.
    fold_for_good(detector.backbone)
    detector.to(dtype)
    detector.pixel_mean, detector.pixel_std = model.pixel_mean.clone(), model.pixel_std.clone()
    return PreparedDETR(detector, cuda_graphs=can_record if cuda_graphs is None else cuda_graphs)


class Batch(NamedTuple):
    """Images as they come, on one canvas.

    Attributes:
        pixels: (N, 3, H, W), images in the top left corners; what stands beside them does not matter.
        image_sizes: (N, 2) int64; None if all images fill the canvas.
    """

    pixels: Tensor
    image_sizes: Tensor | None


class PreparedDETR(nn.Module):
    """What :func:`prepare_for_inference` returns; called as a Detectron2 model in evaluation mode.

    Not for several threads at a time. It has the attributes of its model that callers ask for: ``device``, ``dtype``,
    ``input_format``, ``num_classes``, ``test_topk_per_image``.
    """

    def __init__(self, model: SetPredictionDetector, *, cuda_graphs: bool) -> None:
        super().__init__()
        self.model = model
        self.input_format = model.input_format
        self.num_classes = model.num_classes
        self.test_topk_per_image = model.test_topk_per_image
        self._channels_last = isinstance(getattr(model.backbone, "bottom_up", None), ResNet)
        if self._channels_last:
            model.backbone.to(memory_format=torch.channels_last)
        self._geometries: OrderedDict[Hashable, Geometry] = OrderedDict()
        self._graphs = GraphCache(self._detect) if cuda_graphs else None
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Detect, as the model it was made of does.

        Args:
            batched_inputs: per image "image" (3, H, W), range 0-255, and optionally "height" and "width".

        Returns:
            Per image ``{"instances": Instances(pred_boxes, scores, pred_classes)}``, best first, on the CPU: one
            transfer for the batch.
        """
        images = [x["image"] for x in batched_inputs]
        sizes = [tuple(image.shape[-2:]) for image in images]
        canvas = canvas_of(sizes, self.model.size_divisibility)
        with torch.autocast(self.device.type, enabled=False):
            if self._graphs is None:
                found, _ = self._detect(*self._collect(images, sizes, canvas))
            else:
                found = self._graphs(images, sizes, canvas, self.device)
        found = found.cpu()
        wanted = [(x.get("height", h), x.get("width", w)) for x, (h, w) in zip(batched_inputs, sizes, strict=True)]
        return to_instances(found[..., :4], found[..., 4], found[..., 5].long(), wanted)

    def predict_raw(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """All predictions, in the prepared weights and dtype; see the model's ``predict_raw``. No graphs."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model.predict_raw(batched_inputs)

    def train(self, mode: bool = True) -> "PreparedDETR":
        """Refuse to train.

        Raises:
            RuntimeError: if ``mode`` is True.
        """
        if mode:
            raise RuntimeError("a model prepared for inference cannot train: train the one that it was made of")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PreparedDETR":
        # Moved or converted weights are others than those that graphs and geometries were made with.
        self._geometries.clear()
        if self._graphs is not None:
            self._graphs.clear()
        return super()._apply(fn, recurse)

    def _detect(self, pixels: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, object]:
        """Detect, without any wait for the device.

        Returns:
            (N, k, 6): box xyxy in [0, 1], score, label; and what a graph of this reads that is kept between calls.
        """
        model, canvas = self.model, tuple(pixels.shape[-2:])
        images = model.normalise(pixels)
        if image_sizes is not None:
            images = images.masked_fill(padding_mask(canvas, image_sizes)[:, None], 0.0)
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        features = model.extract_features(images.to(self.dtype, memory_format=layout), image_sizes)
        if image_sizes is None:
            geometry = self._geometry_without_padding(canvas, features)
        else:
            geometry = self._with_level_embed(model.get_geometry(canvas, image_sizes, features))
        output = model.transform(features, geometry, all_proposals=False)
        logits = model.class_embed[len(output.hidden_states) - 1](output.hidden_states[-1])
        if output.of_padding is not None:
            logits = silence(logits, output.of_padding)
        boxes, scores, labels, _ = model.select_detections(logits, output.boxes[-1])
        found = torch.cat((boxes, scores[..., None], labels[..., None].to(scores.dtype)), dim=-1)
        shapes, points = geometry.spatial_shapes, geometry.reference_points
        pixels = get_sampled_pixels(canvas, shapes, self.device)
        return found, (geometry, pixel_sizes(shapes, points), get_cells(shapes, points), pixels)

    def _geometry_without_padding(self, canvas: tuple[int, int], features: Sequence[Tensor]) -> Geometry:
        """Geometry of one image that fills its canvas, which serves all images of a batch."""
        if canvas not in self._geometries:
            size = torch.tensor([canvas], device=self.device)
            geometry = self.model.get_geometry(canvas, size, [feature[:1] for feature in features])
            self._geometries[canvas] = self._with_level_embed(geometry)._replace(padding_mask=None, hidden_cells=None)
            if len(self._geometries) > MAX_GEOMETRIES:
                self._geometries.popitem(last=False)
        self._geometries.move_to_end(canvas)
        return self._geometries[canvas]

    def _with_level_embed(self, geometry: Geometry) -> Geometry:
        positions = self.model.transformer.add_level_embed(geometry)
        return geometry._replace(positions=positions, has_level_embed=True)

    def _collect(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], canvas: tuple[int, int]) -> Batch:
        if all(size == canvas for size in sizes):
            pixels = images[0][None] if len(images) == 1 else torch.stack(list(images))
            return Batch(pixels.to(self.device), None)
        pixels = images[0].new_zeros(len(images), images[0].shape[0], *canvas, dtype=common_type(images))
        for target, image, (height, width) in zip(pixels, images, sizes, strict=True):
            target[:, :height, :width] = image
        return Batch(pixels.to(self.device), torch.tensor(sizes, device=self.device))
