"""What is arranged for a device, and computes what the plain formula computes: pieces, layouts, random numbers.

Each entry says what it brings, measured on 2 cores; what brings less than 3 % of a step has no place here. Frozen batch
norms inside of convolutions, which need Detectron2, are in ``modeling/frozen_bn.py``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .precision import as_autocast

# Rows of the encoder's feed-forward network at a time: their hidden activations stay in the cache.
ROWS_AT_ONCE = 1024
# Pairs of prediction and object that are compared at a time. The terms of the cost need about ten times
# the memory of the cost itself; at this size that is 10 MiB whatever the number of proposals and objects.
PAIRS_AT_ONCE = 2**18
# Logits of the focal loss at a time: the intermediate results stay in the cache of a CPU.
LOGITS_AT_ONCE = 2**18
# A GPU takes so many times as much of both at a time: it has no such cache, and pays for the launches of every piece.
_TIMES_ON_GPU = 32


def at_once(size: int, device: torch.device) -> int:
    """How much of what a CPU does in pieces of ``size`` a device does at a time."""
    return size if device.type == "cpu" else size * _TIMES_ON_GPU


def in_slices(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of rows, (..., C) -> (..., C), slice by slice where that is faster: inference on the CPU.

    A third off the encoder's feed-forward networks, 4 % off an inference at 480 x 640, and 70 MB at 800 x 1066.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or _is_traced():
        return function(x)
    slices = x.flatten(0, -2).split(ROWS_AT_ONCE)
    return torch.cat([function(rows) for rows in slices]).view_as(x)


def converted_once(x: Tensor) -> Callable[[], Tensor]:
    """Return what gives ``x`` to one reader after another, as autocast would convert it for each, from one copy.

    None of them may write into it. Gradients of the readers are added up in the dtype of ``x``, as they are where each
    has a copy of its own.
    """
    copy = None if _is_traced() else as_autocast(x.detach())
    return (lambda: x) if copy is None or copy.dtype is x.dtype else lambda: _Converted.apply(x, copy)


class _Converted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def in_pieces(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield pieces of ``size`` rows of tensors (N, rows, ...) of equally many rows, as views."""
    return zip(*(tensor.split(size, dim=1) for tensor in tensors), strict=True)


def in_convolution_layout(images: Tensor) -> Tensor:
    """Images in the layout in which the device convolves fastest: channels last on the CPU.

    A tenth off an inference of a two-stage R50 at 800 x 1066 (5267 to 4755 ms of one thread), 1 % at 480 x 640.
    """
    return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images


class Dropout(nn.Dropout):
    """``nn.Dropout`` with a mask that is cheap on the CPU: 0.5 s less of a training step of 3.2 s at 480 x 640.

    PyTorch draws a 64-bit random number for each element there, on one thread, and keeps a float of it for the
    backward pass. Here each such number serves four elements and one byte is kept: less than half of the time and a
    quarter of the memory. The probability is rounded to a multiple of 2**-16, and what is kept scaled accordingly, so
    that the expected output is the input. Elsewhere, and for compilers and exporters, it is ``nn.Dropout`` itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        if not self.drops_some or _is_traced() or x.device.type != "cpu":
            return super().forward(x)
        count = x.numel()
        random = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        drop = (random.view(torch.int16)[:count] < self._dropped - 2**15).view(x.shape)
        return x.masked_fill(drop, 0.0).mul_(self.scale(x.device))

    @property
    def drops_some(self) -> bool:
        """Whether now something is dropped, and not all."""
        return self.training and 0 < self._dropped < 2**16

    def scale(self, device: torch.device) -> float:
        """Return the factor of what is not dropped."""
        return 2**16 / (2**16 - self._dropped) if device.type == "cpu" else 1 / (1 - self.p)

    @property
    def _dropped(self) -> int:
        """Of 2**16."""
        return round(self.p * 2**16)


def relu_and_dropout(x: Tensor, dropout: nn.Module) -> Tensor:
    """``dropout(relu(x))`` of what nothing else will read; of a :class:`Dropout` the result alone is kept.

    Where that is zero, ``x`` was not positive or was dropped: the backward pass needs neither ReLU's result nor a mask.
    A training step in bfloat16 on two images of 800 x 1333 so needs 3,565 MiB in place of 4,356, by count.
    """
    if not torch.is_grad_enabled():
        return dropout(x.relu_())
    if type(dropout) is Dropout and dropout.drops_some and x.device.type in ("cpu", "cuda") and not _is_traced():
        # A hook of the dropout wants to see what has a gradient.
        if not (dropout._forward_hooks or dropout._forward_pre_hooks):
            return _ReLUAndDropout.apply(x, dropout)
    # Not in place: a linear layer returns a view, and to write into it costs three copies in the backward pass.
    return dropout(x.relu())


class _ReLUAndDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout) -> Tensor:
        # Not the other way round, in place: dropout makes NaN of the -inf that a linear layer of float16 may return.
        out = dropout(x.relu())
        ctx.save_for_backward(out)
        ctx.scale = dropout.scale(x.device)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, out, 0).mul_(ctx.scale), None


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
