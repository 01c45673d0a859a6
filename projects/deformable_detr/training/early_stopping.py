"""End a training that has stopped getting better."""

import json
import logging
import math
import os
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..files import write_json
from .checkpointer import DeformableDETRCheckpointer

logger = logging.getLogger(__name__)

# In the output folder: the metric's values so far, from which a resumed run goes on counting. A checkpoint would not
# do, as it is written before the evaluation of its iteration.
FILE = "early_stopping.json"


class TrainingEnded(BaseException):
    """Leaves Detectron2's loop before its last iteration; no Exception, which the loop would report as a failure."""


class EarlyStopping(HookBase):
    """End the run once so many evaluations in a row were no better than the best one before them.

    ``model_final.pth`` is written then, with what is needed to go on under another patience. It comes behind all other
    hooks, which do their work at the last iteration as at any other.

    Args:
        metric: of the evaluation, such as "bbox/AP"; higher is better.
        patience: evaluations, at least 1.
        period: of the evaluations, in iterations.
        key: of the patience in the user's configuration, for the message.

    Raises:
        TrainingEnded: in every process, before the first step of a resumed run that had ended so, or after a step.
    """

    def __init__(
        self, checkpointer: DeformableDETRCheckpointer, metric: str, *, patience: int, period: int, key: str
    ) -> None:
        self._checkpointer = checkpointer
        self._metric = metric
        self._patience = patience
        self._period = period
        self._key = key
        self._path = os.path.join(checkpointer.save_dir, FILE)
        self._values: list[tuple[int, float]] = []

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if start > 0 and os.path.isfile(self._path):
            with open(self._path, encoding="utf-8") as file:
                record = json.load(file)
            if record["metric"] == self._metric:
                self._values = [(iteration, value) for iteration, value in record["values"] if iteration < start]
        self._end_if_over()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period <= 0 or done % self._period or done == self.trainer.max_iter:
            return
        value, iteration = self.trainer.storage.latest().get(self._metric, (None, None))
        if comm.is_main_process() and value is not None:
            # Without an object of a kind there is no number, which is no better than any.
            self._values.append((iteration, value if math.isfinite(value) else -1.0))
            write_json(self._path, {"metric": self._metric, "values": self._values})
        self._end_if_over(save=True)

    def _end_if_over(self, *, save: bool = False) -> None:
        # Only the main process has results.
        told = comm.all_gather(self._verdict())[0]
        if told is None:
            return
        if save:
            self._checkpointer.save("model_final", iteration=self.trainer.iter)
        logger.info(told)
        raise TrainingEnded(told)

    def _verdict(self) -> str | None:
        """Return why the run is over; None while it is not."""
        if not self._values:
            return None
        best, (iteration, value) = max(enumerate(self._values), key=lambda item: (item[1][1], -item[0]))
        waited = len(self._values) - 1 - best
        if waited < self._patience:
            return None
        return (
            f"Training ends after iteration {self._values[-1][0]}: {self._metric} was {value:.4f} after iteration "
            f"{iteration} and no better in {waited} evaluations since ({self._key} is {self._patience}). "
            "model_best.pth has the best weights, model_final.pth the last ones"
        )


def ending_early(train: Callable[..., Any], *args: Any) -> Any:
    """Call what trains; None where it ended early."""
    try:
        return train(*args)
    except TrainingEnded:
        return None
