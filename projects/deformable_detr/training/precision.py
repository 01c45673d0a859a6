"""Mixed precision on CPU and CUDA, in training and in evaluation."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from .settings import TrainingSettings

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """In what a model computes.

    Attributes:
        device_type: "cpu" or "cuda".
        dtype: to which autocast goes where that is safe; None computes everything in float32.
    """

    device_type: str
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, settings: TrainingSettings, model: nn.Module) -> "Precision":
        """Return the precision that a configuration asks for, on the device of its model.

        Raises:
            ValueError: on an unknown precision, and where the device cannot compute in it.
        """
        device_type = next(model.parameters()).device.type
        if not settings.amp_enabled:
            return cls(device_type)
        if settings.amp_precision not in DTYPES:
            key = settings.keys["amp_precision"]
            raise ValueError(f"{key} must be one of {sorted(DTYPES)}, got {settings.amp_precision!r}")
        _check_support(settings, device_type)
        return cls(device_type, DTYPES[settings.amp_precision])

    def autocast(self) -> AbstractContextManager:
        """Return a context in which forward passes compute in this precision."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, which is active for float16 alone: bfloat16 has the range of float32."""
        return torch.amp.GradScaler(self.device_type, enabled=self.dtype is torch.float16)


def _check_support(settings: TrainingSettings, device_type: str) -> None:
    """Try it: PyTorch has no list of what its kernels support on the CPU, which differs between versions."""
    name, keys = settings.amp_precision, settings.keys
    conv = nn.Conv2d(3, 4, 3, device=device_type)
    try:
        with torch.autocast(device_type, dtype=DTYPES[name]):
            conv(torch.zeros(1, 3, 4, 4, device=device_type)).float().sum().backward()
    except RuntimeError as error:
        raise ValueError(
            f"{keys['amp_precision']} {name} does not work on this {device_type} with PyTorch {torch.__version__} "
            f"({error}). Take {'bfloat16' if name == 'float16' else 'float16'} or switch {keys['amp_enabled']} off"
        ) from error
