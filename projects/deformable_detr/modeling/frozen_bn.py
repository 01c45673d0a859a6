"""Frozen batch norms, computed as part of the convolution before them: at every call, or once for good."""

from collections.abc import Callable

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from ..layers.precision import at_least_float32


class FrozenBNConv2d(Conv2d):
    """Detectron2's convolution with its FrozenBN multiplied into the weights at every call.

    One pass over the features in place of two, or of three in training, where the products are kept for the backward
    pass (89 MiB for a ResNet-50 in float32): a tenth off a ResNet. Gradients, and names and values of parameters and
    buffers are unchanged. With another norm in the place of its FrozenBN it is Detectron2's convolution again.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        if not _has_frozen_norm(self):
            return super().forward(x)
        x = self._conv_forward(x, *self.folded())
        return x if self.activation is None else self.activation(x)

    def scale(self) -> Tensor:
        """What the norm multiplies with, (C_out,) in float32 at least."""
        norm = self.norm
        return at_least_float32(norm.weight) * (at_least_float32(norm.running_var) + norm.eps).rsqrt()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that does the work of both, multiplied in float32 at least."""
        norm, dtype, scale = self.norm, self.weight.dtype, self.scale()
        weight, bias = self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        return weight.to(dtype), bias.to(dtype)


def fold_frozen_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every convolution with a FrozenBN in ``module`` by a :class:`FrozenBNConv2d` of the same parameters.

    Returns:
        ``module``, or what replaces it.
    """
    return replace_modules(module, _as_folding, lambda m: type(m) is Conv2d and _has_frozen_norm(m))


def fold_for_good(module: nn.Module) -> nn.Module:
    """Replace every :class:`FrozenBNConv2d` in ``module`` by a convolution that holds the product: for inference.

    Those whose norm has been replaced by one that is not frozen stay.

    Returns:
        ``module``, or what replaces it.
    """
    return replace_modules(module, _as_folded, is_folding)


def is_folding(module: nn.Module) -> bool:
    """Whether a module is a :class:`FrozenBNConv2d` that still has a FrozenBN."""
    return type(module) is FrozenBNConv2d and _has_frozen_norm(module)


def _has_frozen_norm(conv: Conv2d) -> bool:
    return type(conv.norm) is FrozenBatchNorm2d and conv.bias is None


def _as_folding(conv: Conv2d) -> FrozenBNConv2d:
    new = _like(conv, FrozenBNConv2d, bias=False)
    new.weight, new.norm = conv.weight, conv.norm
    return new


def _as_folded(conv: FrozenBNConv2d) -> Conv2d:
    new = _like(conv, Conv2d, bias=True)
    with torch.no_grad():
        weight, bias = conv.folded()
    trainable = conv.weight.requires_grad
    new.weight, new.bias = nn.Parameter(weight, trainable), nn.Parameter(bias, trainable)
    return new


def _like(conv: Conv2d, kind: type[Conv2d], *, bias: bool) -> Conv2d:
    """Another convolution of the same sizes and mode, whose parameters are for the caller to set."""
    with torch.device("meta"):  # No memory, and above all no random number: a seed is to give the same model.
        new = kind(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            bias=bias,
            activation=conv.activation,
        )
    return new.train(conv.training)


def replace_modules(
    module: nn.Module, make: Callable[[nn.Module], nn.Module], wanted: Callable[[nn.Module], bool]
) -> nn.Module:
    """Replace wanted modules inside of ``module``, also in lists that modules keep of their children, as FPN does.

    Returns:
        ``module``, or what replaces it.
    """
    if wanted(module):
        return make(module)
    new = {child: make(child) for child in module.modules() if wanted(child)}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in new:
                setattr(parent, name, new[child])
        for value in vars(parent).values():
            if isinstance(value, list):
                value[:] = [new.get(item, item) if isinstance(item, nn.Module) else item for item in value]
    return module
