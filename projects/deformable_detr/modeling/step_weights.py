"""The weights of a training step, made ready all at once: multiplied with frozen norms, converted for autocast.

:class:`FrozenBNConv2d` and autocast do the same by themselves, module by module, and the numbers are theirs, bit for
bit. But each of their operations is a launch, for which a GPU waits: this saves a step in bfloat16 a quarter of 4,150.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from detectron2.modeling import ResNet
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..layers import MultiheadAttention
from ..layers.precision import autocast_dtype
from .backbone import MultiScaleBackbone
from .frozen_bn import FrozenBNConv2d, is_folding

# What of a module has ready weights as attributes for a while: its attributes, and their names.
Shadows = list[tuple[dict[str, Any], str]]


@contextmanager
def ready_weights(model: nn.Module) -> Iterator[None]:
    """Let the modules of a detector find their weights as they need them; without gradients do nothing.

    A compiled transformer is left out, whose program does the same.

    A module reads an attribute of its own before it looks for a parameter of that name: for the duration of the context
    such attributes hold the ready weights. Parameters, gradients and hooks stay where they are.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        yield
        return
    shadows: Shadows = []
    try:
        for layer in map(_members, _layers(model)):
            _fold(layer, shadows)
            _convert(layer, shadows)
        yield
    finally:
        for attributes, name in shadows:
            del attributes[name]


def _layers(model: nn.Module) -> list[nn.Module]:
    """Group weights whose gradients may arrive together: for DistributedDataParallel to exchange them meanwhile.

    Left out are backbones that we do not know, and layers that compute a second time in the backward pass, when the
    context is over, or that may do so, as an encoder or decoder of one's own does not say.
    """
    layers = []
    if isinstance(model.backbone, MultiScaleBackbone):
        layers.append(model.backbone.input_proj)
        if isinstance(model.backbone.bottom_up, ResNet):
            layers += model.backbone.bottom_up.children()
    if model.is_compiled or _is_checkpoint(model.transformer):
        return layers  # Heads are called in the transformer as well.
    layers += [model.class_embed, model.bbox_embed]
    for part in model.transformer.children():
        if _is_checkpoint(part):
            continue
        if not hasattr(part, "layers"):
            layers.append(part)
            continue
        if not getattr(part, "activation_checkpoint", True):
            layers += part.layers
        layers += [child for child in part.children() if child is not part.layers]
    return layers


def _is_checkpoint(module: nn.Module) -> bool:
    """Whether a module is what PyTorch's apply_activation_checkpointing, which users call, puts around another."""
    return "_checkpoint_wrapped_module" in module._modules


class _Members:
    """The modules of a layer whose weights are made ready, and what is kept of them between steps.

    Not among them are modules that compute a second time.

    Attributes:
        children: of every module in the layer, as they are and as they were found.
        convs: those with a frozen norm.
        slots: attributes, parameters and name of a parameter of every module that autocast computes in half precision.
        constants: see :func:`_constants`.
    """

    def __init__(self, layer: nn.Module) -> None:
        modules = list(layer.modules())
        self.children = [(module._modules, module._modules.copy()) for module in modules if module._modules]
        again = {inner for module in modules if _is_checkpoint(module) for inner in module.modules()}
        modules = [module for module in modules if module not in again]
        self.convs = [module for module in modules if is_folding(module)]
        self.slots = [
            (module.__dict__, module._parameters, name)
            for module in modules
            if type(module) in _CONVERTED
            for name in module._parameters
        ]
        self.constants: tuple[list[Any], list[Tensor], list[_Constants]] | None = None


# To look for them at every step took longer than all else here.
_KEPT: WeakKeyDictionary[nn.Module, _Members] = WeakKeyDictionary()


def _members(layer: nn.Module) -> _Members:
    """Find the members of a layer, unless they are known and no module in it is another one since."""
    members = _KEPT.get(layer)
    if members is None or any(now != then for now, then in members.children):
        members = _KEPT[layer] = _Members(layer)
    return members


def _fold(layer: _Members, shadows: Shadows) -> None:
    """Give every FrozenBNConv2d its product."""
    convs = layer.convs
    if not convs or convs[0].weight.dtype not in (torch.float32, torch.float64):
        return
    dtype = autocast_dtype(convs[0].weight.device.type) or convs[0].weight.dtype
    constants = _constants(layer, dtype)
    trained = [(conv.weight, kept.scale) for conv, kept in zip(convs, constants, strict=True) if kept.folded is None]
    weights, scales = zip(*trained, strict=True) if trained else ((), ())
    products = iter(_Ready.apply(dtype, scales, *weights) if trained else ())
    for conv, (folded, _, bias) in zip(convs, constants, strict=True):
        pair = (next(products) if folded is None else folded, bias)
        _shadow(shadows, conv.__dict__, "folded", lambda pair=pair: pair)


def _convert(layer: _Members, shadows: Shadows) -> None:
    """Give every layer that autocast computes in half precision its weights in it."""
    slots = [
        (attributes, name, parameter)
        for attributes, parameters, name in layer.slots
        if (parameter := parameters[name]) is not None and parameter.requires_grad and parameter.dtype is torch.float32
    ]
    dtype = autocast_dtype(slots[0][2].device.type) if slots else None
    if dtype is None:
        return
    converted = _Ready.apply(dtype, None, *(parameter for _, _, parameter in slots))
    for (attributes, name, _), weight in zip(slots, converted, strict=True):
        _shadow(shadows, attributes, name, weight)


# Linear is what nn.MultiheadAttention calls its output projection, by a name of its own.
_CONVERTED = (nn.Linear, nn.Conv2d, MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)


class _Ready(torch.autograd.Function):
    """Weights, each times its scale where there are scales, in another dtype: a few operations for all of them."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, scales: Sequence[Tensor] | None, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.scales, ctx.dtype = scales, weights[0].dtype
        ready = list(weights) if scales is None else torch._foreach_mul(weights, scales)
        return tuple(_to(dtype, ready))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        back = _to(ctx.dtype, grads)
        return None, None, *(back if ctx.scales is None else torch._foreach_mul(back, ctx.scales))


def _to(dtype: torch.dtype, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if tensors[0].dtype is dtype:
        return tensors
    # Contiguous, as gradients of channels-last convolutions are not: else autograd would copy each once more.
    converted = [torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in tensors]
    torch._foreach_copy_(converted, tensors)
    return converted


class _Constants(NamedTuple):
    """What follows from the frozen values of a convolution: the product, if the weight is one of them; scale and bias.

    Shapes: as the weight, (C_out, 1, 1, 1), (C_out,).
    """

    folded: Tensor | None
    scale: Tensor
    bias: Tensor


def _constants(layer: _Members, dtype: torch.dtype) -> list[_Constants]:
    """Return those of all convolutions, kept until a tensor that they follow from is replaced or written to."""
    sources: list[Tensor] = []
    for conv in layer.convs:
        norm = conv.norm._buffers
        sources += (norm["weight"], norm["bias"], norm["running_mean"], norm["running_var"], conv._parameters["weight"])
    # A step writes to weights that are trained.
    key = [dtype, *(None if source.requires_grad else source._version for source in sources)]
    kept = layer.constants
    if kept is None or kept[0] != key or not all(map(is_, kept[1], sources)):
        kept = layer.constants = key, sources, [_constants_of(conv, dtype) for conv in layer.convs]
    return kept[2]


@torch.no_grad()
def _constants_of(conv: FrozenBNConv2d, dtype: torch.dtype) -> _Constants:
    folded, bias = conv.folded()
    return _Constants(
        None if conv.weight.requires_grad else folded.to(dtype), conv.scale()[:, None, None, None], bias.to(dtype)
    )


def _shadow(shadows: Shadows, attributes: dict[str, Any], name: str, value: object) -> None:
    attributes[name] = value
    shadows.append((attributes, name))
