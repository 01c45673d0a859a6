"""Dropout whose random numbers do not cost more than what surrounds them."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``nn.Dropout`` with a mask that is cheap on the CPU.

    PyTorch draws a 64-bit random number for each element there, on one thread, and keeps a float of it for the
    backward pass. Here each such number serves four elements and one byte is kept: less than half of the time and a
    quarter of the memory. The probability is rounded to a multiple of 2**-16, and what is kept scaled accordingly, so
    that the expected output is the input. Elsewhere, and for compilers and exporters, it is ``nn.Dropout`` itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        dropped = round(self.p * 2**16)
        plain = not self.training or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if plain or x.device.type != "cpu" or dropped in (0, 2**16):
            return super().forward(x)
        count = x.numel()
        random = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        drop = (random.view(torch.int16)[:count] < dropped - 2**15).view(x.shape)
        return x.masked_fill(drop, 0.0).mul_(2**16 / (2**16 - dropped))
