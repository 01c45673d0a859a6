"""Deformable convolution (arXiv 1703.06211) and its modulated form (arXiv 1811.11168) in ResNets.

Detectron2's blocks compute by its compiled operator, which few installations have and which trains on GPUs alone. Here
torchvision's operator does the work, on every device and with the same names of parameters.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.layers import DeformConv, ModulatedDeformConv
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ..layers.precision import at_least_float32
from .frozen_bn import replace_modules


class TorchvisionDeformConv(nn.Module):
    """What Detectron2's ``DeformConv`` or ``ModulatedDeformConv`` computes, with its parameters."""

    def __init__(self, conv: DeformConv | ModulatedDeformConv) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.weight, self.norm, self.activation = conv.weight, conv.norm, conv.activation
        self.register_parameter("bias", conv.bias)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (N, C_in, H, W).
            offset: (N, 2 * G * K, H', W'), (y, x) in cells for each of G groups of channels and K taps.
            mask: (N, G * K, H', W'), what each tap counts; None: all of it.

        Returns:
            (N, C_out, H', W').
        """
        # The operator knows no bfloat16, in which an offset would be rounded to a quarter of a cell, too.
        given = (x, offset, self.weight, self.bias, mask)
        wide, offset, weight, bias, mask = (None if t is None else at_least_float32(t) for t in given)
        x = deform_conv2d(wide, offset, weight, bias, self.stride, self.padding, self.dilation, mask).to(x.dtype)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


def use_torchvision_deform_conv(module: nn.Module) -> nn.Module:
    """Replace every deformable convolution of Detectron2 in ``module`` by one of the same parameters.

    Returns:
        ``module``, or what replaces it.
    """
    return replace_modules(module, TorchvisionDeformConv, lambda m: type(m) in (DeformConv, ModulatedDeformConv))


def deformable_stages(
    depth: int,
    *,
    modulated: bool = False,
    num_groups: int = 1,
    on_per_stage: Sequence[bool] = (False, True, True, True),
    **options: Any,
) -> list[list[nn.Module]]:
    """Make the stages of a bottleneck ResNet with deformable 3x3 convolutions.

    Args:
        depth: 50 or more.
        modulated: version 2, in which every tap also has a weight.
        num_groups: groups of channels with offsets of their own.
        on_per_stage: which of res2 to res5 have them.
        options: as for ``ResNet.make_default_stages``.

    Raises:
        ValueError: if a ResNet of this depth has no bottlenecks.
    """
    if depth < 50:
        raise ValueError(f"deformable convolutions need bottleneck blocks: depth must be 50 or more, got {depth}")
    plain = ResNet.make_default_stages(depth, **options)
    options |= {"deform_modulated": modulated, "deform_num_groups": num_groups}
    deformable = ResNet.make_default_stages(depth, DeformBottleneckBlock, **options)
    return [d if on else p for on, d, p in zip(on_per_stage, deformable, plain, strict=True)]
