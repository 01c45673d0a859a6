"""What half precision is not enough for: points, boxes, sums."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, float32 and float64 as they are."""
    return x.to(wide(x.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for types of half precision, otherwise the type itself."""
    # In place of torch.promote_types, which goes through the dispatcher.
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def as_autocast(x: Tensor) -> Tensor:
    """Convert what several layers read as autocast would for each of them; outside of it do nothing."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype is not torch.float32 else x.to(dtype)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return what autocast computes in on a type of device; None outside of it."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
