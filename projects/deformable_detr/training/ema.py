"""A moving average of the weights."""

import copy
from typing import Any

import torch
from torch import nn

from .step import unwrap


class ModelEMA:
    """An exponential moving average of a model's weights, evaluated and saved beside the trained ones.

    The decay grows with the number of updates n as min(decay, (1 + n) / (10 + n)), so that short runs are not
    averaged with their initialisation. Buffers are copied: batch statistics are averages already.

    ``torch.optim.swa_utils.AveragedModel`` gives the same numbers, but copies buffer by buffer: 214 launches for R50.

    Args:
        model: the trained model, also wrapped for distributed training.
        decay: share of the average that an update keeps.

    Attributes:
        model: a copy of the model with the averaged weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(unwrap(model))

    def start(self, model: nn.Module) -> None:
        """Be the present weights until there is an average: those that were loaded after this copy was made."""
        if self.updates == 0:
            self.model.load_state_dict(unwrap(model).state_dict())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the present weights into the average; the first time they are the average."""
        model = unwrap(model)
        averages, weights = list(self.model.parameters()), list(model.parameters())
        if self.updates == 0:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + self.updates) / (10 + self.updates)))
        if buffers := list(self.model.buffers()):
            torch._foreach_copy_(buffers, list(model.buffers()))
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
