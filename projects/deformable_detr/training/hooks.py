"""What happens around the steps: the same hooks for both configuration systems."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)
from torch import nn

from ..data.loader import TrainLoader
from ..data.randomness import STEP, seed_generators
from ..files import replacing
from .checkpointer import DeformableDETRCheckpointer
from .loop import TrainingLoop
from .settings import TrainingSettings

logger = logging.getLogger(__name__)

# Of Detectron2's writers.
_SMOOTHING_WINDOW = 20


def build_hooks(
    settings: TrainingSettings,
    checkpointer: DeformableDETRCheckpointer,
    *,
    scheduler: Any,
    evaluate: Callable[[], dict | None],
    max_iter: int,
    before_saving: Sequence[HookBase] = (),
) -> list[HookBase]:
    """Hooks of a run: timing, learning rate, checkpoints, evaluation, the best checkpoint, logging.

    Args:
        scheduler: of the learning rate, as ``hooks.LRScheduler`` takes it.
        evaluate: returns the metrics; called in every process.
        before_saving: hooks that change the model after the optimiser has.
    """
    built: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler(scheduler=scheduler), *before_saving]
    # After the checkpoint, with which an evaluation that fails can be repeated.
    evaluation = EvalHook(settings.eval_period, evaluate, first=settings.first_eval)
    if not comm.is_main_process():
        return [*built, evaluation]
    writers = build_writers(settings.output_dir, max_iter, settings.log_period)
    built += [
        # Before the checkpoint: the resumed run does not write the line of its iteration again.
        EarlyWriter(writers[:2], period=settings.log_period),
        PeriodicCheckpointer(checkpointer, settings.checkpoint_period, max_to_keep=settings.max_to_keep),
        evaluation,
    ]
    if settings.best_metric:
        built.append(BestCheckpointer(settings.eval_period, checkpointer, settings.best_metric))
    return [*built, hooks.PeriodicWriter(writers[1:], period=settings.log_period)]


def build_writers(output_dir: str, max_iter: int, period: int) -> tuple[EventWriter, EventWriter, EventWriter]:
    """Writers to the terminal, to ``metrics.json`` and to TensorBoard.

    They smooth over the iterations since the last line, at most over 20. With a period of 1 every line holds the
    plain values of its iteration.
    """
    window = min(period, _SMOOTHING_WINDOW)
    os.makedirs(output_dir, exist_ok=True)
    return (
        CommonMetricPrinter(max_iter),
        MetricsWriter(os.path.join(output_dir, "metrics.json"), window_size=window),
        TensorboardXWriter(output_dir, window_size=window),
    )


class MetricsWriter(JSONWriter):
    """Detectron2's writer, which can write twice in an iteration: the second line has what has come since the first."""

    def __init__(self, json_file: str, window_size: int) -> None:
        super().__init__(json_file, window_size)
        self._written: dict[str, int] = {}

    def write(self) -> None:
        lines: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._written.get(name, -1):
                self._written[name] = iteration
                lines.setdefault(iteration, {"iteration": iteration})[name] = value
        if lines:
            self._file_handle.writelines(json.dumps(lines[key], sort_keys=True) + "\n" for key in sorted(lines))
            self._file_handle.flush()
            os.fsync(self._file_handle.fileno())


class PreciseBN(hooks.PreciseBN):
    """Detectron2's hook, made to take the batches that training takes next: a resumed run computes the same statistics.

    Args:
        loop: with a :class:`TrainLoader`.
        model: whose statistics are computed: the loop's, or its average.
        period: in iterations, besides the last one.
        num_iter: batches of every process.

    Raises:
        TypeError: if the loop has another loader.
    """

    def __init__(self, loop: TrainingLoop, model: nn.Module, *, period: int, num_iter: int) -> None:
        if not isinstance(loop.data_loader, TrainLoader):
            raise TypeError(f"TEST.PRECISE_BN needs a TrainLoader, got {type(loop.data_loader).__name__}")
        super().__init__(period, model, loop.data_loader, num_iter)
        self._loop = loop

    def update_stats(self) -> None:
        loop = self._loop
        start = loop.images_seen // loop.data_loader.total_batch_size
        self._data_iter = loop.data_loader.batches(seed=loop.seed, start=start)
        seed_generators(loop.seed, STEP, loop.iter, comm.get_rank())
        super().update_stats()
        # Ends the loading processes.
        self._data_iter.close()


class EarlyWriter(hooks.PeriodicWriter):
    """Detectron2's hook for writers that a later one closes."""

    def after_train(self) -> None:
        pass


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's hook, which also leaves ``model_final`` where a run was killed right before it was written."""

    def before_train(self) -> None:
        super().before_train()
        final = f"{self.file_prefix}_final.pth"
        path = os.path.join(self.checkpointer.save_dir, final)
        if self.trainer.start_iter >= self.max_iter and not os.path.isfile(path):
            # No step is left, and the last checkpoint is what would have been written.
            with open(self.checkpointer.get_checkpoint_file(), "rb") as last, replacing(path) as stream:
                shutil.copyfileobj(last, stream)
            self.checkpointer.tag_last_checkpoint(final)


class EvalHook(hooks.EvalHook):
    """Evaluates every ``eval_period`` iterations, at the end, and once early: a mistake shows before a day has passed.

    Args:
        first: after how many iterations the early evaluation is; 0 for none.
    """

    def __init__(self, eval_period: int, eval_function: Callable[[], dict | None], *, first: int = 0) -> None:
        super().__init__(eval_period, eval_function)
        self._first = first

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_regular = self._period > 0 and done % self._period == 0
        if done == self._first and not is_regular and done != self.trainer.max_iter:
            self._do_eval()
        super().after_step()


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, which neither forgets its best when a run is resumed nor takes over ``last_checkpoint``."""

    def before_train(self) -> None:
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if self.trainer.start_iter > 0 and os.path.isfile(path):
            best = self._checkpointer.read(path).get("best")
            if best is not None and best["metric"] == self._val_metric:
                self._update_best(best["value"], best["iteration"])

    def _best_checking(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (None, None))
        if value is None:
            logger.warning(f"The evaluation gives no {self._val_metric!r}: no checkpoint is kept as the best")
        elif self.best_metric is None or self._compare(value, self.best_metric):
            if self._update_best(value, iteration):
                best = {"metric": self._val_metric, "value": value, "iteration": iteration}
                self._checkpointer.save(self._file_prefix, tag=False, iteration=iteration, best=best)
                logger.info(f"Best {self._val_metric} so far: {value:.4f} after iteration {iteration}")
