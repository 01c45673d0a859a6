"""Detection in Python: a model by name, images in, Detectron2's Instances out."""

import os
from collections import defaultdict
from collections.abc import Sequence

import torch
from detectron2.structures import Instances
from torch import nn
from torchvision.ops import batched_nms

from ..checkpoint.classes import COCO_CLASSES_BY_ID
from ..loading import DTYPES, LoadedModel, class_index, load_model
from ..modeling import prepare_for_inference
from .images import ImageSource, prepare_image, read_image
from .results import read_best_score

# Batches whose images are in memory together, so that those of equal size find each other.
_BATCHES_IN_MEMORY = 8


class Predictor:
    """Detects objects in images of any kind and size.

    Each image is resized as for evaluation. Boxes come in pixels of the original image, upright as its EXIF
    orientation says. They are clipped to the image, which the model and the official evaluation do not do. Unless
    ``merge_iou`` asks for it, there is no non-maximum suppression, as DETR needs none once it is trained.

    Only images that have the same size after resizing share a batch, so results do not depend on ``batch_size``.
    Padding to a common size would move predictions: convolutions and GroupNorm see the border of the canvas, and masks
    of small images are rounded to whole cells (measured: scores by up to 0.66, on a model of 128 pixel images). Images
    of any sizes share a batch of a model that is ``padding_invariant``.

    A predictor is for one thread at a time; others take a predictor of their own, or a lock.

    Args:
        model: a name of the model zoo, a config file, the output folder of a training, or a model of
            :func:`deformable_detr.loading.load_model`, which keeps its weights, device and config.
        weights: file or address in place of those of ``model``; "" keeps the random initialisation.
        device: where to compute; by default on the GPU if there is one.
        score_threshold: lowest score that is returned, from 0 to 1; "best" is the one with the best F1 in the last
            evaluation of ``model``, which must then be the output folder of a training with a report.
        merge_iou: of two detections of one class that overlap by more than this IoU, only the better one is returned;
            for models that were trained briefly. None keeps all.
        classes: names of the only classes that are returned; None returns all. They are taken out of the best
            detections of all classes, of which an image has as many as the evaluation takes (100).
        batch_size: images that go through the model together.
        dtype: of the computation; a copy of the model has its weights in it, see
            :func:`deformable_detr.prepare_for_inference`.
        channels_last: keep the backbone's weights in this memory layout, as a ResNet's are anyway.
        cuda_graphs: replay images of a size that was seen before as one CUDA graph.
        compile: compile the transformer with ``torch.compile``, in place of preparing a copy; the first images take
            minutes.
        input_format: channel order of arrays, "RGB" or "BGR" (as ``cv2.imread`` gives).
        opts: overrides of the config.

    Raises:
        FileNotFoundError, KeyError, CheckpointError: as :func:`deformable_detr.loading.load_model`.
        ValueError: on a value that is not among those above; of an unknown class with the nearest one.
    """

    def __init__(
        self,
        model: str | os.PathLike | LoadedModel,
        weights: str | os.PathLike | None = None,
        *,
        # Model:
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        cuda_graphs: bool = False,
        compile: bool = False,
        opts: Sequence[str] = (),
        # Input and output:
        score_threshold: float | str = 0.3,
        merge_iou: float | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int = 1,
        input_format: str = "RGB",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(score_threshold, str):
            if score_threshold != "best":
                raise ValueError(f'score_threshold must be a number or "best", got {score_threshold!r}')
            score_threshold = read_best_score(model)
        for name, value in {"score_threshold": score_threshold, "merge_iou": merge_iou}.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value:g}")
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of torch.{', torch.'.join(DTYPES)}, got {dtype}")
        if compile and cuda_graphs:
            raise ValueError("give compile or cuda_graphs, not both")
        if isinstance(model, LoadedModel):
            if weights is not None or device is not None or opts:
                raise ValueError("weights, device and opts are for a model by name; this one is loaded already")
            self.loaded = model
        else:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            self.loaded = load_model(model, weights, device=device, opts=opts)
        self.score_threshold = score_threshold
        self.merge_iou = merge_iou
        self._labels = None if classes is None else [class_index(name, self.class_names) for name in classes]
        self.batch_size = batch_size
        self.dtype = dtype
        self.input_format = input_format
        self.category_ids = _category_ids(self.class_names)
        if channels_last:
            self.loaded.model.backbone.to(memory_format=torch.channels_last)
        self.detector = self._build_detector(cuda_graphs, compile=compile)

    @property
    def class_names(self) -> list[str]:
        """Names of ``pred_classes``."""
        return self.loaded.class_names

    @property
    def window(self) -> int:
        """Images that are worth handing to :meth:`predict` together."""
        return self.batch_size * _BATCHES_IN_MEMORY if self.batch_size > 1 else 1

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> Instances | list[Instances]:
        """Detect in one image, or in a list of them.

        Args:
            images: see :func:`read_image`.

        Returns:
            For one image Instances on the CPU, for a list one per image: ``pred_boxes`` (n, 4) xyxy pixels, ``scores``
            (n,), ``pred_classes`` (n,), best first, of image_size (H, W).

        Raises:
            ImageError: if an image cannot be read.
            ValueError: on a list of numbers, an array of floats, ...
        """
        if not isinstance(images, (list, tuple)):
            return self([images])[0]
        results = []
        for start in range(0, len(images), self.window):
            results += self.predict([self.prepare(image) for image in images[start : start + self.window]])
        return results

    def prepare(self, image: ImageSource) -> dict:
        """Read and resize an image; :func:`prepare_image` documents the result."""
        return prepare_image(self.loaded, read_image(image, input_format=self.input_format))

    def predict(self, inputs: Sequence[dict]) -> list[Instances]:
        """Detect in prepared images, up to ``batch_size`` at a time; results in the given order."""
        by_size = defaultdict(list)
        for index, x in enumerate(inputs):
            by_size[None if self.loaded.model.padding_invariant else x["image"].shape].append(index)
        results: dict[int, Instances] = {}
        for indices in by_size.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                results |= zip(batch, self._forward([inputs[i] for i in batch]), strict=True)
        return [results[i] for i in range(len(inputs))]

    def to_json(self, instances: Instances) -> list[dict]:
        """Return detections as JSON takes them, best first.

        Returns:
            Per detection "category_id" (COCO's own where all names are COCO's, else 1 for the first class),
            "category" (its name), "score", and "bbox" (x, y, width, height) in pixels.
        """
        boxes = instances.pred_boxes.tensor.double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        return [
            {
                "category_id": self.category_ids[label],
                "category": self.class_names[label],
                "score": round(score, 6),
                "bbox": [round(value, 3) for value in box],
            }
            for label, score, box in zip(instances.pred_classes.tolist(), instances.scores.tolist(), boxes, strict=True)
        ]

    def _build_detector(self, cuda_graphs: bool, *, compile: bool) -> nn.Module:
        model = self.loaded.model
        if compile:
            model.transformer.compile(dynamic=True)
            return model
        return prepare_for_inference(model, dtype=self.dtype, cuda_graphs=cuda_graphs)

    @torch.no_grad()
    def _forward(self, batch: list[dict]) -> list[Instances]:
        # A prepared copy computes in its own dtype all the same.
        autocast = torch.autocast(self.loaded.model.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with autocast:
            outputs = self.detector(batch)
        return [self._select(output["instances"].to("cpu")) for output in outputs]

    def _select(self, instances: Instances) -> Instances:
        instances = instances[instances.scores >= self.score_threshold]
        if self._labels is not None:
            instances = instances[torch.isin(instances.pred_classes, torch.tensor(self._labels))]
        instances.pred_boxes.clip(instances.image_size)
        if self.merge_iou is not None:
            boxes, scores, classes = instances.pred_boxes.tensor, instances.scores, instances.pred_classes
            instances = instances[batched_nms(boxes, scores, classes, self.merge_iou)]
        return instances


def _category_ids(class_names: Sequence[str]) -> list[int]:
    """COCO's ids where the classes have COCO's names, so that results fit its annotations; else 1, 2, 3, ..."""
    known = {name: index for index, name in enumerate(COCO_CLASSES_BY_ID) if name is not None}
    # The official models have an output for every id up to 90; those of no category have no name.
    ids = [known.get(name, i if name == f"class {i}" else None) for i, name in enumerate(class_names)]
    if None in ids or not known.keys() & set(class_names):
        return list(range(1, len(class_names) + 1))
    return ids
