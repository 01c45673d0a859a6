"""What happens around the steps: the same hooks for both configuration systems."""

import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from ..data.loader import TrainLoader
from ..data.randomness import STEP, seed_generators
from ..files import replacing
from ..wording import name_first
from .checkpointer import DeformableDETRCheckpointer, step_checkpoints
from .early_stopping import EarlyStopping
from .loop import TrainingLoop
from .settings import TrainingSettings
from .writers import MetricsWriter

logger = logging.getLogger(__name__)


def build_hooks(
    settings: TrainingSettings,
    checkpointer: DeformableDETRCheckpointer,
    *,
    scheduler: Any,
    evaluate: Callable[[], dict | None],
    build_writers: Callable[[], Sequence[EventWriter]],
    before_saving: Sequence[HookBase] = (),
) -> list[HookBase]:
    """Hooks of a run: timing, learning rate, checkpoints, evaluation, the best checkpoint, logging.

    Args:
        scheduler: of the learning rate, as ``hooks.LRScheduler`` takes it.
        evaluate: returns the metrics; called in every process.
        build_writers: called in the main process alone.
        before_saving: hooks that change the model after the optimiser has.
    """
    built: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler(scheduler=scheduler), *before_saving]
    # After the checkpoint, with which an evaluation that fails can be repeated.
    evaluation = EvalHook(evaluate, period=settings.eval_period, first=settings.first_eval)
    metric = settings.best_metric or ("bbox/AP" if settings.patience else "")
    options = {"patience": settings.patience, "period": settings.eval_period, "key": settings.keys["patience"]}
    stopping = [EarlyStopping(checkpointer, metric, **options)] if settings.patience else []
    if not comm.is_main_process():
        return [*built, evaluation, *stopping]
    writers = build_writers()
    # Whatever a user has made of these classes is written once an iteration, behind all that it may want to have.
    printers = [writer for writer in writers if type(writer) is CommonMetricPrinter]
    early = printers + [writer for writer in writers if type(writer) is MetricsWriter]
    built += [
        FirstLine(printers, period=settings.log_period),
        # Before the checkpoint: the resumed run does not write the line of its iteration again.
        EarlyWriter(early, period=settings.log_period),
        PeriodicCheckpointer(checkpointer, settings.checkpoint_period, max_to_keep=settings.max_to_keep),
        evaluation,
    ]
    if metric:
        built.append(BestCheckpointer(checkpointer, metric, period=settings.eval_period))
    late = [writer for writer in writers if writer not in printers]
    return [*built, hooks.PeriodicWriter(late, period=settings.log_period), *stopping]


def _is_due(trainer: Any, period: int) -> bool:
    """Whether ``period`` (0 for never) iterations have been done again."""
    return period > 0 and (trainer.iter + 1) % period == 0


class PreciseBN(HookBase):
    """Compute batch statistics anew, as Detectron2's hook does, from the batches that training takes next.

    A resumed run computes the same statistics.

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
        self._loop = loop
        self._model = model
        self._period = period
        self._num_iter = num_iter

    def after_step(self) -> None:
        if _is_due(self.trainer, self._period) or self.trainer.iter + 1 == self.trainer.max_iter:
            self.update_stats()

    def update_stats(self) -> None:
        """Compute the statistics now."""
        loop = self._loop
        start = loop.images_seen // loop.data_loader.total_batch_size
        seed_generators(loop.seed, STEP, loop.iter, comm.get_rank())
        # What the passes log goes into a storage of its own. Closing the batches ends the loading processes.
        with EventStorage(), closing(loop.data_loader.batches(seed=loop.seed, start=start)) as batches:
            logger.info(f"Computing batch statistics from {self._num_iter} batches")
            update_bn_stats(self._model, batches, self._num_iter)


class EarlyWriter(hooks.PeriodicWriter):
    """Detectron2's hook for writers that a later one closes, or that have nothing to close."""

    def after_train(self) -> None:
        pass


class FirstLine(HookBase):
    """Print the first iteration of a run: whoever has started it sees that it runs, and how its losses begin.

    Args:
        printers: whose lines go to the terminal alone; ``metrics.json`` stays as it is.
        period: of their other lines.
    """

    def __init__(self, printers: Sequence[EventWriter], *, period: int) -> None:
        self._printers = printers
        self._period = period

    def after_step(self) -> None:
        # EarlyWriter prints the last one.
        printed = _is_due(self.trainer, self._period) or self.trainer.iter + 1 == self.trainer.max_iter
        if self.trainer.iter == self.trainer.start_iter and not printed:
            for printer in self._printers:
                printer.write()


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's hook for resumed runs: it keeps as many checkpoints as were asked for, and the last one.

    Those of before the resume count among them, and ``model_final`` is left where a run was killed right before it was
    written.
    """

    def before_train(self) -> None:
        super().before_train()
        kept = step_checkpoints(self.checkpointer.save_dir)
        self.recent_checkpoints = [file for iteration, file in kept.items() if iteration < self.trainer.start_iter]
        final = f"{self.file_prefix}_final.pth"
        path, last_path = os.path.join(self.checkpointer.save_dir, final), self.checkpointer.get_checkpoint_file()
        if self.trainer.start_iter < self.max_iter:
            return
        # No step is left, and the last checkpoint is what would have been written. An older file is what it began from.
        if not os.path.isfile(path) or os.path.getmtime(path) < os.path.getmtime(last_path):
            with open(last_path, "rb") as last, replacing(path) as stream:
                shutil.copyfileobj(last, stream)
            self.checkpointer.tag_last_checkpoint(final)


class EvalHook(HookBase):
    """Evaluate every ``period`` iterations, at the end, and once early: a mistake shows before a day has passed.

    Args:
        evaluate: returns the metrics by task, in the main process; called in every process.
        period: in iterations; 0 evaluates at the end alone.
        first: after how many iterations the early evaluation is; 0 for none.
    """

    def __init__(self, evaluate: Callable[[], dict | None], *, period: int, first: int = 0) -> None:
        self._evaluate = evaluate
        self._period = period
        self._first = first

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done != self.trainer.max_iter and (done == self._first or _is_due(self.trainer, self._period)):
            self._run()

    def after_train(self) -> None:
        # Not after a step that has failed.
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._run()
        # It may hold the trainer, which holds this hook.
        del self._evaluate

    def _run(self) -> None:
        results = self._evaluate()
        if results:
            self.trainer.storage.put_scalars(**flatten_results_dict(results), smoothing_hint=False)
        # Processes take different times, and begin the next iteration together.
        comm.synchronize()


class BestCheckpointer(HookBase):
    """Keep the checkpoint that is best in a metric, through resumed runs and beside ``last_checkpoint``.

    Args:
        metric: of the evaluation, such as "bbox/AP"; higher is better.
        period: of the evaluations; the last one is looked at as well.
    """

    FILE = "model_best"

    def __init__(self, checkpointer: DeformableDETRCheckpointer, metric: str, *, period: int) -> None:
        self._checkpointer = checkpointer
        self._metric = metric
        self._period = period
        self._best = -math.inf

    def before_train(self) -> None:
        path = os.path.join(self._checkpointer.save_dir, f"{self.FILE}.pth")
        if self.trainer.start_iter > 0 and os.path.isfile(path):
            best = self._checkpointer.read(path).get("best")
            if best is not None and best["metric"] == self._metric:
                self._best = best["value"]

    def after_step(self) -> None:
        if _is_due(self.trainer, self._period) and self.trainer.iter + 1 != self.trainer.max_iter:
            self._check()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._check()

    def _check(self) -> None:
        latest = self.trainer.storage.latest()
        value, iteration = latest.get(self._metric, (None, None))
        if value is None:
            # Losses and times have no task before their name.
            given = name_first([name for name in latest if "/" in name])
            logger.warning(
                f"The evaluation gives no {self._metric!r}: no checkpoint is kept as the best. Its metrics are {given}"
            )
        elif self._best < value < math.inf:
            self._best = value
            best = {"metric": self._metric, "value": value, "iteration": iteration}
            self._checkpointer.save(self.FILE, tag=False, iteration=iteration, best=best)
            logger.info(f"Best {self._metric} so far: {value:.4f} after iteration {iteration}")
