"""What every attention of a model to the image looks at, recorded while the model runs.

Shapes: N images, Q queries of one attention (encoder cells S or decoder queries Lq), M heads, L levels, P points,
Ld decoder layers, K classes. Pixels are those of the original image, (0, 0) at the outer corner of its first pixel.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert

from ..layers import MSDeformAttn
from ..modeling import FocalClassification, SetPredictionDetector
from ..modeling.classification import Classification
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


class AttentionMap(NamedTuple):
    """One dense attention layer on one image.

    Attributes:
        weights: (Q, M, H, W), summing to 1 over the unpadded cells; of the encoder the mean of the heads, M = 1.
    """

    weights: Tensor


@dataclass(frozen=True)
class Recording:
    """One image's way through a model; all tensors float32 on the CPU.

    Attributes:
        height, width: of the original image in pixels.
        encoder, decoder: per layer what it sampled or, of DETR, how it attended to all cells.
        valid_sizes: (L, 2) unpadded cells per level as (w, h).
        spatial_shapes: (H, W) of every level's padded map.
        pred_logits: (Ld, Lq, K).
        pred_boxes: (Ld, Lq, 4) cxcywh in [0, 1] of the image.
        classification: how the logits are read.
    """

    height: int
    width: int
    encoder: list[Sampling] | list[AttentionMap]
    decoder: list[Sampling] | list[AttentionMap]
    valid_sizes: Tensor
    spatial_shapes: list[tuple[int, int]]
    pred_logits: Tensor
    pred_boxes: Tensor
    classification: Classification = FocalClassification()

    @property
    def is_dense(self) -> bool:
        """Whether every layer attends to all cells of one map, as in DETR."""
        return isinstance(self.decoder[0], AttentionMap)

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


def record(model: SetPredictionDetector, batched_inputs: Sequence[dict[str, Any]]) -> list[Recording]:
    """Run a model in evaluation mode and record its attention; the predictions are those of ``model.predict_raw``.

    The encoder dominates the memory: 34 MB per layer for a 800x1333 image at the sizes of the paper; for DETR 4 MB,
    and 71 MB where it is dilated.

    Args:
        model: a Deformable DETR of any kind, or a DETR.
        batched_inputs: as for the model, each with "image" and optionally the original "height" and "width".

    Returns:
        A recording per image.
    """
    transformer = model.transformer
    encoder, decoder = _attentions(transformer)
    is_dense = isinstance(decoder[0], nn.MultiheadAttention)
    recorder = _Recorder()
    if is_dense:
        hooks = [recorder.weigh(module, by_head=module in decoder) for module in (*encoder, *decoder)]
    else:
        hooks = [recorder.watch(module) for module in transformer.modules() if isinstance(module, MSDeformAttn)]
    hooks.append(transformer.register_forward_pre_hook(recorder.keep_geometry, with_kwargs=True))
    try:
        with recorder:
            outputs = model.predict_raw(list(batched_inputs))
    finally:
        for hook in hooks:
            hook.remove()
    valid_sizes, spatial_shapes = recorder.geometry.valid_sizes.cpu(), recorder.geometry.spatial_shapes
    recordings = []
    for index, x in enumerate(batched_inputs):
        height, width = x.get("height", x["image"].shape[-2]), x.get("width", x["image"].shape[-1])
        to_pixels = _pixels_per_padded_map(spatial_shapes, valid_sizes[index], (height, width))
        if is_dense:
            read = partial(recorder.attention_map, index=index, shape=spatial_shapes[0], valid=valid_sizes[index, 0])
        else:
            read = partial(recorder.sampling, index=index, to_pixels=to_pixels)
        recordings.append(
            Recording(
                height=height,
                width=width,
                encoder=[read(module) for module in encoder],
                decoder=[read(module) for module in decoder],
                valid_sizes=valid_sizes[index],
                spatial_shapes=spatial_shapes,
                pred_logits=outputs["pred_logits"][:, index].float().cpu(),
                pred_boxes=outputs["pred_boxes"][:, index].float().cpu(),
                classification=model.classification,
            )
        )
    return recordings


def _attentions(transformer: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the modules by which every encoder and decoder layer attends to the image."""
    encoder = [layer.self_attn for layer in transformer.encoder.layers]
    decoder = [getattr(layer, "cross_attn", None) or layer.multihead_attn for layer in transformer.decoder.layers]
    return encoder, decoder


class _Call(NamedTuple):
    """Tensors of one call: (N, Q, L, 2 or 4), (N, Q, M, L, P, 2), (N, Q, M, L, P), in [0, 1] of the padded map."""

    reference_points: Tensor
    locations: Tensor
    weights: Tensor


class _Recorder(TorchDispatchMode):
    """Sees every call of the operator with its real arguments, and from hooks which module it serves.

    Dense attention is seen by hooks alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[nn.Module, _Call] = {}
        self.weights: dict[nn.Module, Tensor] = {}
        self.geometry: Geometry | None = None
        self._running: tuple[nn.Module, Tensor] | None = None

    def watch(self, module: MSDeformAttn) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_pre_hook(self._start, with_kwargs=True)

    def weigh(self, module: nn.MultiheadAttention, *, by_head: bool) -> torch.utils.hooks.RemovableHandle:
        """Keep the weights (N, M, Q, S) of a dense attention, or (N, 1, Q, S) of the mean of its heads."""

        def attend(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # Beside the model's own call, which computes no weights and, without them, not quite the same.
            wanted = {"need_weights": True, "average_attn_weights": not by_head}
            weights = module.forward(*args, **{**kwargs, **wanted})[1]
            self.weights[module] = (weights if by_head else weights[:, None]).float().cpu()

        return module.register_forward_pre_hook(attend, with_kwargs=True)

    def attention_map(self, module: nn.Module, *, index: int, shape: tuple[int, int], valid: Tensor) -> AttentionMap:
        columns, rows = valid.int().tolist()
        weights = self.weights[module][index].unflatten(-1, shape)[..., :rows, :columns]
        return AttentionMap(weights.transpose(0, 1))

    def sampling(self, module: nn.Module, *, index: int, to_pixels: Tensor) -> Sampling:
        return _in_pixels(self.calls[module], index, to_pixels)

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
