"""Features of an image that do not depend on the canvas around it, nor on the images beside it in a batch.

A convolution has a bias, and so has a norm: behind the first of them padding is no longer zero, and the next 3x3
convolution takes it in where an image that fills its canvas has the zeros of its border. GroupNorm takes its statistics
over padding too. Here both see what they would see without padding.

Shapes: N images in the top left corners of a canvas of (H, W) pixels, maps (N, C, h, w) of it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..layers.precision import at_least_float32
from .padding import padding_mask

# Of the largest feature: far more than rounding makes, far less than padding does where nothing masks it.
_TOLERANCE = 1e-4


class MaskedPadding(TorchFunctionMode):
    """While active, whatever looks at neighbours or takes statistics sees an image as if it had no padding.

    Convolutions and average pooling see zeros there, as they do beyond the border; max pooling sees nothing; GroupNorm
    and global average pooling leave it out. Everything that is computed cell by cell stays as it is.

    The stride of every map must divide the canvas: cells are then partly image, partly zeros, on every canvas alike.

    Args:
        canvas: H and W.
        image_sizes: (N, 2) heights and widths of the images.
    """

    def __init__(self, canvas: Sequence[int], image_sizes: Tensor) -> None:
        super().__init__()
        self._canvas = canvas
        self._image_sizes = image_sizes
        self._masks: dict[str, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rule = _RULES.get(func)
        return func(*args, **(kwargs or {})) if rule is None else rule(self, func, *args, **(kwargs or {}))

    def _padding(self, x: Tensor) -> Tensor:
        """(N, 1, h, w) bool, True = padding of a map."""
        shape = tuple(x.shape[-2:])
        # By its words: sizes are symbols while torch.export traces.
        key = str(shape)
        if key not in self._masks:
            strides = [pixels // cells for pixels, cells in zip(self._canvas, shape, strict=True)]
            sizes = [-(-size // stride) for size, stride in zip(self._image_sizes.unbind(1), strides, strict=True)]
            self._masks[key] = padding_mask(shape, torch.stack(sizes, dim=1))[:, None]
        return self._masks[key]

    def _without_padding(self, x: Tensor) -> Tensor:
        # Padding counts for nothing, so that it may change in place where nothing is kept for a backward pass: a tenth
        # of the time. For a new tensor, where() takes a third of the time of masked_fill().
        padding = self._padding(x)
        return torch.where(padding, 0.0, x) if torch.is_grad_enabled() else x.masked_fill_(padding, 0.0)

    def _convolve(self, convolution: Callable, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tuple(weight.shape[-2:]) != (1, 1):
            x = self._without_padding(x)
        return convolution(x, weight, *args, **kwargs)

    def _average(self, pool: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return pool(self._without_padding(x), *args, **kwargs)

    def _maximum(self, pool: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pooled = pool(torch.where(self._padding(x), -torch.inf, x), *args, **kwargs)
        # Not to leave infinities behind: of one of each sign, a 1x1 convolution would make NaN.
        return self._without_padding(pooled)

    def _global_average(self, pool: Callable, x: Tensor, output_size: Any) -> Tensor:
        if output_size not in (1, (1, 1)):
            raise ValueError(f"average pooling to {output_size} cells depends on the canvas: padding_invariant needs 1")
        return self._without_padding(x).sum((2, 3), keepdim=True) / (~self._padding(x)).sum((2, 3), keepdim=True)

    def _group_norm(
        self,
        norm: Callable,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        padding = self._padding(x)[:, None]
        grouped = at_least_float32(x).unflatten(1, (num_groups, -1))
        count = (~padding).sum((2, 3, 4), keepdim=True) * grouped.shape[2]
        mean = torch.where(padding, 0.0, grouped).sum((2, 3, 4), keepdim=True) / count
        centred = grouped - mean
        variance = torch.where(padding, 0.0, centred).square().sum((2, 3, 4), keepdim=True) / count
        normed = (centred * (variance + eps).rsqrt()).flatten(1, 2)
        if weight is not None:
            normed = normed * weight[:, None, None] + bias[:, None, None]
        # Under autocast the norm itself returns float32.
        return normed if torch.is_autocast_enabled(x.device.type) else normed.to(x.dtype)


_RULES = {
    torch.conv2d: MaskedPadding._convolve,
    torch.ops.torchvision.deform_conv2d: MaskedPadding._convolve,
    F.avg_pool2d: MaskedPadding._average,
    F.max_pool2d: MaskedPadding._maximum,
    F.adaptive_avg_pool2d: MaskedPadding._global_average,
    F.group_norm: MaskedPadding._group_norm,
}


@torch.no_grad()
def check_invariance(backbone: Backbone) -> None:
    """Refuse a backbone whose features depend on the canvas even with :class:`MaskedPadding`, such as attention does.

    Found by two passes of a small image. Weights are random there: those of a new model may hide what they will do, as
    a scale of zero at the end of a block does.

    Raises:
        ValueError: naming the backbone. Also if its features are infinite or NaN at padding: attention weights of zero,
            and gradients of zero, would not hide that.
    """
    shapes = backbone.output_shape()
    stride = max(shape.stride for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(backbone).cpu().eval()
    for tensor in [*probe.parameters(), *probe.buffers()]:
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator)
            # About unit variance behind a layer; scales, biases and variances of norms from 0.5 to 1.5.
            tensor.copy_((values - 0.5) * (12 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else values + 0.5)
    height, width = stride + stride // 4 + 1, stride // 2 + 3
    image = torch.rand(1, 3, height, width, generator=generator)
    found = []
    for rows, columns in ((2, 1), (3, 3)):
        canvas = (rows * stride, columns * stride)
        with MaskedPadding(canvas, torch.tensor([[height, width]])):
            features = probe(F.pad(image, (0, canvas[1] - width, 0, canvas[0] - height)))
        found.append(features)
    for name, shape in shapes.items():
        valid = (slice(None), slice(None), slice(-(-height // shape.stride)), slice(-(-width // shape.stride)))
        one, other = found[0][name][valid], found[1][name][valid]
        change = ((one - other).abs().max() / one.abs().max()).item()
        if not all(features[name].isfinite().all() for features in found):
            fault = "is not finite where there is padding"
        elif not change < _TOLERANCE:
            fault = f"changes with the canvas by {change:.1g} of its largest value"
        else:
            continue
        kind = type(getattr(backbone, "bottom_up", backbone)).__name__
        raise ValueError(f"padding_invariant is for backbones that convolve and pool: {name} of this {kind} {fault}")
