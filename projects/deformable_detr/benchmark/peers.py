"""Our models and their peers, behind one interface: images in, predictions or losses out."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torchvision
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..checkpoint import CheckpointError, export
from ..loading import load_model
from ..modeling import DETR, SetPredictionDetector
from ..wording import counted, name_first

TORCHVISION = ("fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn")
OURS, TRANSFORMERS = "deformable_detr", "transformers"
_WITHOUT = f"--peers without {TRANSFORMERS} leaves it out"


@dataclass(frozen=True)
class Batch:
    """N images of noise (3, H, W) uint8; on the host, as a loader leaves them, objects: xyxy (n, 4), classes (n,)."""

    images: list[Tensor]
    boxes: list[Tensor]
    labels: list[Tensor]

    @property
    def device(self) -> str:
        """Of the images."""
        return str(self.images[0].device)


def make_batch(height: int, width: int, *, size: int, device: str, num_objects: int = 7) -> Batch:
    """Random images; seven objects are the average of COCO."""
    generator = torch.Generator().manual_seed(0)
    images, boxes, labels = [], [], []
    for _ in range(size):
        images.append(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8).to(device))
        corners = torch.rand(num_objects, 2, 2, generator=generator) * 0.8
        boxes.append(torch.cat((corners.amin(1), corners.amax(1) + 0.1), 1) * torch.tensor([width, height] * 2))
        labels.append(torch.randint(0, 80, (num_objects,), generator=generator))
    return Batch(images, boxes, labels)


class Ours(nn.Module):
    """Our model on a :class:`Batch`: detections in evaluation mode, the sum of the losses in training mode."""

    def __init__(self, model: SetPredictionDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> list | Tensor:
        if not self.training:
            return self.model([{"image": image} for image in batch.images])
        inputs = []
        for image, boxes, labels in zip(batch.images, batch.boxes, batch.labels, strict=True):
            instances = Instances(tuple(image.shape[1:]), gt_boxes=Boxes(boxes), gt_classes=labels)
            inputs.append({"image": image, "instances": instances})
        return torch.stack(list(self.model(inputs).values())).sum()


class Transformers(nn.Module):
    """transformers' detector of the same kind with the weights of our model, and its own loss.

    Raises:
        ValueError: if transformers has no such model, or is built in another size here.
    """

    def __init__(self, model: SetPredictionDetector) -> None:
        super().__init__()
        try:
            weights = export(model, to="transformers")
        except CheckpointError as error:
            raise ValueError(f"{error}; {_WITHOUT}") from error
        transformers = importlib.import_module("transformers")
        options = {
            "num_labels": model.num_classes,
            "num_queries": model.num_queries,
            "dilation": _is_dilated(model),
            "backbone": "resnet101" if len(model.backbone.bottom_up.res4) == 23 else "resnet50",
            "use_timm_backbone": True,
            "use_pretrained_backbone": False,
            "auxiliary_loss": True,
        }
        if isinstance(model, DETR):
            peer = transformers.DetrForObjectDetection(transformers.DetrConfig(**options))
        else:
            config = transformers.DeformableDetrConfig(
                num_feature_levels=len(model.transformer.level_embed),
                with_box_refine=model.transformer.with_box_refine,
                two_stage=model.transformer.two_stage,
                two_stage_num_proposals=model.num_queries,
                disable_custom_kernels=True,
                **options,
            )
            peer = transformers.DeformableDetrForObjectDetection(config)
        self.model = peer.to(model.device)
        self.scores = model.classification.scores
        _check_sizes(weights, self.model)
        self.model.load_state_dict(weights, strict=True)
        # Plain attributes: they must not count as this peer's parameters.
        self.mean, self.std = model.pixel_mean, model.pixel_std

    def forward(self, batch: Batch) -> object:
        pixels = torch.stack([(image - self.mean) / self.std for image in batch.images])
        mask = torch.ones(pixels.shape[0], *pixels.shape[2:], dtype=torch.long, device=pixels.device)
        if not self.training:
            outputs = self.model(pixel_values=pixels, pixel_mask=mask)
            return self.scores(outputs.logits).flatten(1).topk(100)
        scale, device = torch.tensor(pixels.shape[:1:-1] * 2), pixels.device
        labels = [
            {"class_labels": labels.to(device), "boxes": box_convert(boxes / scale, "xyxy", "cxcywh").to(device)}
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]
        return self.model(pixel_values=pixels, pixel_mask=mask, labels=labels).loss


class Torchvision(nn.Module):
    """A detector of torchvision with random weights, on the images as they are: no resizing inside."""

    def __init__(self, name: str, batch: Batch) -> None:
        super().__init__()
        sides = batch.images[0].shape[1:]
        build = getattr(torchvision.models.detection, name)
        self.model = build(weights=None, weights_backbone=None, min_size=min(sides), max_size=max(sides))

    def forward(self, batch: Batch) -> list:
        return self.model([image / 255 for image in batch.images])


def find_peers(names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are installed."""
    installed = importlib.util.find_spec("transformers") and importlib.util.find_spec("timm")
    return [name for name in names if name != TRANSFORMERS or installed]


def build(name: str, variant: str, batch: Batch, *, opts: Sequence[str] = ()) -> nn.Module:
    """Build a detector with random weights; our model and transformers' of one variant have the same.

    Args:
        name: "deformable_detr", "transformers", or one of torchvision's.
        variant: name of the model zoo, config or output folder.
        batch: tells the device, and torchvision's detectors the size.
        opts: overrides of the config.
    """
    device = batch.images[0].device
    torch.manual_seed(0)
    if name in TORCHVISION:
        return Torchvision(name, batch).to(device).eval()
    model = load_model(variant, "", device=device, opts=opts).model
    return (Ours(model) if name == OURS else Transformers(model)).eval()


def _check_sizes(weights: Mapping[str, Tensor], peer: nn.Module) -> None:
    """Refuse weights of which the peer has others, before PyTorch lists them all."""
    ours, theirs = ({name: tensor.shape for name, tensor in state.items()} for state in (weights, peer.state_dict()))
    if other := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise ValueError(
            "transformers is built in the published sizes with ResNet-50 or ResNet-101 alone, and this model differs "
            f"in {counted(len(other), 'parameter')}, {name_first(other, limit=1)}; {_WITHOUT}"
        )


def _is_dilated(model: SetPredictionDetector) -> bool:
    strides = [shape.stride for shape in model.backbone.output_shape().values()]
    return len(strides) == 1 and strides[0] == 16
