"""Loads the compiled ms_deform_attn and registers everything about it that is written in Python.

The schema lives in csrc/ms_deform_attn.cpp. Without the compiled library the same schema is defined here, so
`torch.ops.deformable_detr.ms_deform_attn` exists either way and torch.compile and torch.export see the same op.
"""

from __future__ import annotations

import functools
import importlib.machinery
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import _pytorch

logger = logging.getLogger(__name__)

# In a checkout; the operator must be compiled against the PyTorch that loads it.
BUILD = "pip install --no-build-isolation --no-deps -e ."

SCHEMAS = (
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
    "Tensor attention_weights) -> Tensor",
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
    "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
)


def find_library() -> Path | None:
    """Path of the compiled library beside the package, None where it was not built."""
    package = Path(__file__).resolve().parent.parent
    candidates = (package / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _load() -> str | None:
    """Load the compiled library; return the reason where there is none to load."""
    path = find_library()
    if path is None:
        return "deformable_detr._C is not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # built for another torch, a missing shared library, ...
        # PyTorch names the file; what is missing, such as an undefined symbol, stands in the cause.
        return f"{path.name} does not load: {error.__cause__ or error}"
    return None


def has_kernel(device_type: str) -> bool:
    """Whether a compiled kernel serves tensors of this device type ("cpu" or "cuda")."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("deformable_detr::ms_deform_attn", key)


@functools.cache
def _warn_once(device_type: str) -> None:
    reason = unavailable_reason or f"deformable_detr._C was built without {device_type} support"
    logger.warning(
        "ms_deform_attn uses its slower PyTorch implementation on %s because %s. To build it for torch %s: %s "
        "(python -m deformable_detr.collect_env has the details).",
        device_type,
        reason,
        torch.__version__,
        BUILD if device_type == "cpu" else f"FORCE_CUDA=1 {BUILD}",
    )


def _forward_pytorch(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    _warn_once(value.device.type)
    return _pytorch.forward(value, spatial_shapes, sampling_locations, attention_weights)


def _forward_fake(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    N, _, M, D = value.shape
    return value.new_empty((N, sampling_locations.shape[1], M * D))


def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (value, sampling_locations, attention_weights)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _save_for_backward(ctx, inputs, output) -> None:
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx, grad_output: Tensor):
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.deformable_detr.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, sampling_locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


def _refuse_double_backward(ctx, *grads):
    # Without a formula PyTorch would drop the second derivatives with a warning only.
    raise RuntimeError("ms_deform_attn is once differentiable: second derivatives are not implemented")


unavailable_reason = _load()
_library = torch.library.Library("deformable_detr", "FRAGMENT")
if unavailable_reason is not None:
    for _schema in SCHEMAS:
        _library.define(_schema)

_FORWARD, _BACKWARD = "deformable_detr::ms_deform_attn", "deformable_detr::ms_deform_attn_backward"
torch.library.register_fake(_FORWARD, _forward_fake, lib=_library)
torch.library.register_fake(_BACKWARD, _backward_fake, lib=_library)
torch.library.register_autograd(_FORWARD, _backward, setup_context=_save_for_backward, lib=_library)
torch.library.register_autograd(_BACKWARD, _refuse_double_backward, lib=_library)
# Serves every backend for which no compiled kernel is registered; a compiled kernel has precedence and is never
# replaced when it fails.
_library.impl("ms_deform_attn", _forward_pytorch, "CompositeExplicitAutograd")
_library.impl("ms_deform_attn_backward", _pytorch.backward, "CompositeExplicitAutograd")
