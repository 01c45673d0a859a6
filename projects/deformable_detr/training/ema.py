"""A moving average of the weights."""

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .step import unwrap


class ModelEMA:
    """An exponential moving average of a model's weights, evaluated and saved beside the trained ones.

    The decay grows with the number of updates n as min(decay, (1 + n) / (10 + n)), so that short runs are not
    averaged with their initialisation. Buffers are copied: batch statistics are averages already.

    Args:
        model: the trained model, also wrapped for distributed training.
        decay: share of the average that an update keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._averaged = AveragedModel(unwrap(model), multi_avg_fn=self._average)

    @property
    def model(self) -> nn.Module:
        """A copy of the model with the averaged weights."""
        return self._averaged.module

    def update(self, model: nn.Module) -> None:
        """Take the present weights into the average; the first time they are the average."""
        self._averaged.update_parameters(unwrap(model))
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
        self._averaged.n_averaged.fill_(self.updates)

    def _average(self, averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(averages, weights, count)
