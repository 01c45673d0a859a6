"""What every deformable attention of a model samples, recorded while the model runs.

Shapes: N images, Q queries of one attention (encoder cells S or decoder queries Lq), M heads, L levels, P points,
Ld decoder layers, K classes. Pixels are those of the original image, (0, 0) at the outer corner of its first pixel.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert

from ..layers import MSDeformAttn
from ..modeling import DeformableDETR
from ..modeling.geometry import Geometry


class Sampling(NamedTuple):
    """One attention layer on one image.

    Attributes:
        locations: (Q, M, L, P, 2), (x, y) in pixels; may lie outside of the image.
        weights: (Q, M, L, P), summing to 1 over L and P.
        reference: (Q, 2) points (x, y) or (Q, 4) boxes cxcywh, in pixels.
    """

    locations: Tensor
    weights: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Recording:
    """One image's way through a model; all tensors float32 on the CPU.

    Attributes:
        height, width: of the original image in pixels.
        encoder, decoder: per layer what it sampled.
        valid_sizes: (L, 2) unpadded cells per level as (w, h).
        spatial_shapes: (H, W) of every level's padded map.
        pred_logits: (Ld, Lq, K).
        pred_boxes: (Ld, Lq, 4) cxcywh in [0, 1] of the image.
    """

    height: int
    width: int
    encoder: list[Sampling]
    decoder: list[Sampling]
    valid_sizes: Tensor
    spatial_shapes: list[tuple[int, int]]
    pred_logits: Tensor
    pred_boxes: Tensor

    @property
    def boxes(self) -> Tensor:
        """(Ld, Lq, 4) boxes xyxy in pixels after every decoder layer."""
        return box_convert(self.pred_boxes, "cxcywh", "xyxy") * self._pixels.repeat(2)

    def cells_at(self, x: float, y: float) -> list[int]:
        """Per level the index into S of the encoder cell over a pixel."""
        cells, start = [], 0
        for (height, width), (valid_w, valid_h) in zip(self.spatial_shapes, self.valid_sizes.tolist(), strict=True):
            column = min(int(x / self.width * valid_w), int(valid_w) - 1)
            row = min(int(y / self.height * valid_h), int(valid_h) - 1)
            cells.append(start + row * width + column)
            start += height * width
        return cells

    @property
    def _pixels(self) -> Tensor:
        return torch.tensor([self.width, self.height], dtype=torch.float32)


def record(model: DeformableDETR, batched_inputs: Sequence[dict[str, Any]]) -> list[Recording]:
    """Run a model in evaluation mode and record its attention; the predictions are those of ``model.predict_raw``.

    The encoder dominates the memory: 34 MB per layer for a 800x1333 image at the sizes of the paper.

    Args:
        model: any of the five variants.
        batched_inputs: as for the model, each with "image" and optionally the original "height" and "width".

    Returns:
        A recording per image.
    """
    transformer = model.transformer
    recorder = _Recorder()
    hooks = [recorder.watch(module) for module in transformer.modules() if isinstance(module, MSDeformAttn)]
    hooks.append(transformer.register_forward_pre_hook(recorder.keep_geometry, with_kwargs=True))
    try:
        with recorder:
            outputs = model.predict_raw(list(batched_inputs))
    finally:
        for hook in hooks:
            hook.remove()
    encoder = [recorder.calls[layer.self_attn] for layer in transformer.encoder.layers]
    decoder = [recorder.calls[layer.cross_attn] for layer in transformer.decoder.layers]
    valid_sizes, spatial_shapes = recorder.geometry.valid_sizes.cpu(), recorder.geometry.spatial_shapes
    recordings = []
    for index, x in enumerate(batched_inputs):
        height, width = x.get("height", x["image"].shape[-2]), x.get("width", x["image"].shape[-1])
        to_pixels = _pixels_per_padded_map(spatial_shapes, valid_sizes[index], (height, width))
        recordings.append(
            Recording(
                height=height,
                width=width,
                encoder=[_in_pixels(call, index, to_pixels) for call in encoder],
                decoder=[_in_pixels(call, index, to_pixels) for call in decoder],
                valid_sizes=valid_sizes[index],
                spatial_shapes=spatial_shapes,
                pred_logits=outputs["pred_logits"][:, index].float().cpu(),
                pred_boxes=outputs["pred_boxes"][:, index].float().cpu(),
            )
        )
    return recordings


class _Call(NamedTuple):
    """Tensors of one call: (N, Q, L, 2 or 4), (N, Q, M, L, P, 2), (N, Q, M, L, P), in [0, 1] of the padded map."""

    reference_points: Tensor
    locations: Tensor
    weights: Tensor


class _Recorder(TorchDispatchMode):
    """Sees every call of the operator with its real arguments, and from hooks which module it serves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[nn.Module, _Call] = {}
        self.geometry: Geometry | None = None
        self._running: tuple[nn.Module, Tensor] | None = None

    def watch(self, module: MSDeformAttn) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_pre_hook(self._start, with_kwargs=True)

    def keep_geometry(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.geometry = _arguments(module, args, kwargs)["geometry"]

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._running = module, _arguments(module, args, kwargs)["reference_points"]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A backbone may use the operator too; only calls inside of a watched module are recorded.
        if func is torch.ops.deformable_detr.ms_deform_attn.default and self._running is not None:
            (module, reference_points), self._running = self._running, None
            self.calls[module] = _Call(reference_points, *args[2:4])
        return func(*args, **(kwargs or {}))


def _arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def _pixels_per_padded_map(
    spatial_shapes: Sequence[tuple[int, int]], valid_sizes: Tensor, size: tuple[int, int]
) -> Tensor:
    """(L, 2): what turns (x, y) in [0, 1] of a level's padded map into pixels of an image of ``size`` (h, w).

    The model stretches the image over the unpadded cells of every level, whose count is rounded up, so this inverts
    what the model means rather than the strides.
    """
    padded = valid_sizes.new_tensor([(width, height) for height, width in spatial_shapes])
    return padded / valid_sizes * valid_sizes.new_tensor([size[1], size[0]])


def _in_pixels(call: _Call, index: int, to_pixels: Tensor) -> Sampling:
    reference = call.reference_points[index, :, 0].float().cpu()  # the same point in all levels
    return Sampling(
        locations=call.locations[index].float().cpu() * to_pixels[:, None],
        weights=call.weights[index].float().cpu(),
        reference=reference * to_pixels[0].repeat(reference.shape[-1] // 2),
    )
