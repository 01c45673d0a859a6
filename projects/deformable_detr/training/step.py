"""One optimisation step without the optimiser: forward and backward of a batch, in parts if need be."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.layers import NaiveSyncBatchNorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.randomness import STEP, seed_generators
from .precision import Precision


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def can_be_alone(model: nn.Module) -> bool:
    """Whether one of several processes can compute losses and gradients of a model without the others."""
    return hasattr(getattr(model, "criterion", None), "alone") and not exchanges_statistics(model)


def exchanges_statistics(model: nn.Module) -> bool:
    """Whether a batch norm of the model waits for the statistics of other processes."""
    return any(isinstance(module, nn.SyncBatchNorm | NaiveSyncBatchNorm) for module in model.modules())


@dataclass
class Step:
    """All that a step depends on besides the weights.

    Attributes:
        batch: what the model takes, of this process.
        rank: of the process.
        accumulation_steps: parts in which the batch goes through the model.
        accumulation_key: of that setting, for error texts.
    """

    batch: list[dict[str, Any]]
    iteration: int
    seed: int
    rank: int = 0
    accumulation_steps: int = 1
    accumulation_key: str = "SOLVER.ACCUMULATION_STEPS"

    @property
    def num_objects(self) -> int:
        """Objects in the batch."""
        return sum(len(x["instances"]) for x in self.batch)

    def micro_batches(self) -> list[list[dict[str, Any]]]:
        """Return the batch in parts of nearly equal size.

        Raises:
            ValueError: if there are fewer images than parts.
        """
        if len(self.batch) < self.accumulation_steps:
            raise ValueError(
                f"a process must have at least one image for every accumulation step: {self.accumulation_key} is "
                f"{self.accumulation_steps}, but the batch of a process has {len(self.batch)} images"
            )
        parts = np.array_split(np.arange(len(self.batch)), self.accumulation_steps)
        return [[self.batch[i] for i in part] for part in parts]

    def backward(
        self, model: nn.Module, precision: Precision, scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, Tensor]:
        """Add the gradients of the batch to the parameters.

        The losses of the parts are divided by the objects of the whole batch, so that losses and gradients are
        those of the whole batch, up to rounding and what padding and batch statistics change.

        Returns:
            Losses of the whole batch, detached. The matcher waits for the device in every part, and nothing else does.
        """
        seed_generators(self.seed, STEP, self.iteration, self.rank)
        parts = self.micro_batches()
        totals: dict[str, Tensor] = {}
        with self._normaliser(model):
            for number, part in enumerate(parts, start=1):
                is_last = number == len(parts)
                with _no_synchronisation(model, active=not is_last):
                    with precision.autocast():
                        losses = model(part)
                    total = torch.stack(list(losses.values())).sum()
                    (total if scaler is None else scaler.scale(total)).backward()
                for name, loss in losses.items():
                    totals[name] = totals[name] + loss.detach() if name in totals else loss.detach()
        return totals

    def _normaliser(self, model: nn.Module) -> AbstractContextManager:
        if self.accumulation_steps == 1:
            return nullcontext()
        return unwrap(model).criterion.normalise_by(self.num_objects, len(self.batch))


def _no_synchronisation(model: nn.Module, *, active: bool) -> AbstractContextManager:
    """Gradients are exchanged once a step, with the last part."""
    return model.no_sync() if active and isinstance(model, DistributedDataParallel) else nullcontext()
