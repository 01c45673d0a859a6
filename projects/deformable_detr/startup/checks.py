"""What is refused at once, before the model is built, the data are read or the training has ended."""

import argparse
import logging
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch import nn

from ..cli import check_device
from ..config import RunConfig
from ..data.classes import check_num_classes
from ..data.datasets import check_dataset_files
from ..data.evaluators import build_evaluator, check_evaluator
from ..training.settings import TrainingSettings
from ..training.writers import import_wandb
from ..wording import name_first
from .options import check_options
from .processors import available_cores
from .user_data import check_user_data_given

logger = logging.getLogger(__name__)


def check_before_start(cfg: CfgNode | DictConfig, args: argparse.Namespace) -> None:
    """Raise at once what would otherwise end the run after the model is built, the data are read or it has trained.

    Raises:
        RuntimeError: if the device is a GPU and there is none.
        FileNotFoundError: if a dataset is not where Detectron2 expects it.
        ValueError: without a dataset to evaluate on or the flags that name the user's data, on values out of range,
            on another number of outputs than the data have classes, on options that nothing here follows.
        What :func:`check_evaluator` does.
    """
    run = RunConfig(cfg, args.opts)
    device = run.get("device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(
            f"{run.key('device')} {device!r} needs a GPU that PyTorch can use, and there is none; set it to cpu"
        )
    check_device(device)
    if args.replay:
        return
    check_options(run)
    _warn_of_many_workers(run)
    check_user_data_given("val", run.evaluated_datasets())
    _check_evaluators(run)
    if args.eval_only and not run.evaluated_datasets():
        raise ValueError(
            f"--eval-only needs a dataset to evaluate on, in {run.key('test_datasets')} or with --val-json"
        )
    if not args.eval_only:
        # Loaders of other projects may have no names at all.
        names = run.get("train_datasets")
        if names == ():
            raise ValueError(f"there is no dataset to train on: {run.key('train_datasets')} is empty")
        names = names or ()
        check_user_data_given("train", names)
        check_dataset_files(names)
        _check_settings(run)
        # Data to train on without a word about their classes are read soon enough.
        check_classes(run, names)
    check_classes(run, run.evaluated_datasets(), read=True)


def largest_image(run: RunConfig) -> tuple[int, int]:
    """Return (height, width) in pixels of the largest image that the training's augmentation makes.

    Raises:
        ValueError: if the configuration does not say, as with the mapper of another project.
    """
    if side := run.get("lsj_size", 0):
        return side, side
    short, long = run.get("min_size_train"), run.get("max_size_train")
    if short is None or long is None:
        keys = f"{run.key('min_size_train')} and {run.key('max_size_train')}"
        raise ValueError(f"{run.key('auto_batch')} needs {keys}, the size of the largest training image")
    return min(short if isinstance(short, int) else max(short), long), long


def check_classes(run: RunConfig, datasets: Sequence[str | None], *, read: bool = False) -> None:
    """Refuse a model with another number of outputs than its data have classes: :func:`check_num_classes`."""
    # Models of other projects may keep the number elsewhere.
    if (num_classes := run.get("num_classes")) is not None:
        check_num_classes(datasets, num_classes, key=run.key("num_classes"), read=read)


def check_unused_parameters(model: nn.Module, cfg: CfgNode | DictConfig) -> None:
    """Warn of a backbone with parameters that nothing depends on, which are never trained.

    Raises:
        ValueError: if several processes would wait for their gradients, as they do from the second step on.
    """
    find = getattr(getattr(model, "backbone", None), "unused_parameters", list)
    names = find()
    if not names:
        return
    run = RunConfig(cfg)
    told = (
        f"{len(names)} parameters of the backbone are never trained, as no level depends on them: {name_first(names)}. "
        "Give the backbone no outputs that in_features does not name"
    )
    if comm.get_world_size() > 1 and not run.get("find_unused_parameters", False):
        raise ValueError(f"{told}, or set {run.key('find_unused_parameters')}: processes wait for their gradients")
    logger.warning(told)


def _check_evaluators(run: RunConfig) -> None:
    """Raise what building the evaluators would raise, before the training that comes first.

    A LazyConfig's evaluator of another kind than :func:`build_evaluator` is built, as nothing is known about it.
    """
    if run.evaluated_datasets() and not _has_own_evaluator(run):
        instantiate(run.lazy_evaluators())
        return
    for name in run.evaluated_datasets():
        if not isinstance(name, str):
            raise ValueError(
                f"a LazyConfig evaluates one dataset, got {len(name)}: {', '.join(name)}. Set "
                f"{run.key('test_datasets')} to its name, without brackets"
            )
        check_evaluator(name)
    check_dataset_files(run.evaluated_datasets())


def _check_settings(run: RunConfig) -> None:
    for name in ("max_iter", "batch"):
        if run.get(name, 1) < 1:
            raise ValueError(f"{run.key(name)} must be at least 1, got {run.get(name)}")
    _check_batch(run)
    _check_auto_batch(run)
    if run.get("wandb_enabled"):
        import_wandb(run.key("wandb_enabled"))
    settings = TrainingSettings.from_config(run.cfg)
    metric = settings.best_metric
    _check_metric_of_several(run, metric, patience=settings.patience)
    # Evaluators of other projects may give anything.
    if metric and "/" not in metric and _has_own_evaluator(run):
        raise ValueError(
            f"{run.key('best_metric')} must be one of metrics.json, such as bbox/AP, got {metric!r}; "
            f"did you mean bbox/{metric}?"
        )


def _check_metric_of_several(run: RunConfig, metric: str, *, patience: int) -> None:
    """Refuse a metric that no evaluation of several datasets gives: the name of one stands before each of theirs."""
    datasets = run.get("test_datasets", ())
    if len(datasets) > 1 and (metric or patience) and not metric.startswith(tuple(f"{name}/" for name in datasets)):
        asking = f"{run.key('patience')} {patience} asks for one: " if patience and not metric else ""
        raise ValueError(
            f"{asking}with {len(datasets)} datasets in {run.key('test_datasets')}, {run.key('best_metric')} must begin "
            f"with the name of one of them, such as {datasets[0]}/bbox/AP, got {metric!r}"
        )


def _warn_of_many_workers(run: RunConfig) -> None:
    workers, cores = run.get("num_workers", 0) * comm.get_local_size(), available_cores()
    if workers > cores and comm.is_main_process():
        logger.warning(
            f"{run.key('num_workers')} is {run.get('num_workers')}: {workers} loading processes on {cores} cores "
            "may be slower than fewer"
        )


def _check_batch(run: RunConfig) -> None:
    processes, batch, parts = comm.get_world_size(), run.get("batch", 0), run.get("accumulation_steps", 1)
    if batch % processes:
        raise ValueError(f"{run.key('batch')} must be a multiple of the {processes} processes, got {batch}")
    if 0 < batch // processes < parts:
        raise ValueError(
            f"{run.key('accumulation_steps')} is {parts}, but the batch of a process has {batch // processes} images "
            f"({run.key('batch')} is {batch}): a part must have at least one"
        )


def _check_auto_batch(run: RunConfig) -> None:
    if not run.get("auto_batch"):
        return
    if not run.get("device").startswith("cuda"):
        raise ValueError(
            f"{run.key('auto_batch')} (--batch-size auto) asks what fits into the memory of a GPU, and "
            f"{run.key('device')} is {run.get('device')!r}: set {run.key('batch')}, and "
            f"{run.key('accumulation_steps')} to the number of parts in which it goes through the model"
        )
    if run.get("accumulation_steps", 1) > 1:
        raise ValueError(
            f"{run.key('auto_batch')} (--batch-size auto) finds {run.key('accumulation_steps')}, which is set to "
            f"{run.get('accumulation_steps')}: leave out one of the two"
        )
    largest_image(run)


def _has_own_evaluator(run: RunConfig) -> bool:
    """Whether :func:`build_evaluator` makes every evaluator that there is."""
    targets = [evaluator["_target_"] for evaluator in run.lazy_evaluators()]
    return all((locate(target) if isinstance(target, str) else target) is build_evaluator for target in targets)
