"""What is refused at once, in place of after the model is built, the data are read or the training has ended."""

import argparse
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from ..config import get_device
from ..data.datasets import check_dataset_files
from ..data.evaluators import build_evaluator, check_evaluator
from ..training.settings import TrainingSettings
from .user_data import check_user_data_given


def check_before_start(cfg: CfgNode | DictConfig, args: argparse.Namespace) -> None:
    """Raise at once what would otherwise end the run after the model is built, the data are read or it has trained.

    Raises:
        RuntimeError: if the device is a GPU and there is none.
        FileNotFoundError: if a dataset is not where Detectron2 expects it.
        ValueError: without a dataset to evaluate on or the flags that name the user's data, on values out of range.
        What :func:`check_evaluator` does.
    """
    device = get_device(cfg)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(
            f"the device {device!r} needs a GPU that PyTorch can use, and there is none; "
            "set MODEL.DEVICE cpu (yaml) or train.device=cpu (LazyConfig)"
        )
    if args.replay:
        return
    check_user_data_given("val", _test_datasets(cfg))
    _check_evaluators(cfg)
    if args.eval_only and not _test_datasets(cfg):
        raise ValueError("--eval-only needs a dataset to evaluate on, in the configuration or with --val-json")
    if not args.eval_only:
        check_user_data_given("train", _train_datasets(cfg))
        check_dataset_files(_train_datasets(cfg))
        _check_settings(cfg)


def _check_evaluators(cfg: CfgNode | DictConfig) -> None:
    """Raise what building the evaluators would raise, before the training that comes first.

    A LazyConfig's evaluator of another kind than :func:`build_evaluator` is built, as nothing is known about it.
    """
    if not _has_own_evaluator(cfg):
        instantiate(cfg.dataloader.evaluator)
        return
    for name in _test_datasets(cfg):
        check_evaluator(name)
    check_dataset_files(_test_datasets(cfg))


def _check_settings(cfg: CfgNode | DictConfig) -> None:
    if isinstance(cfg, CfgNode):
        values = {"SOLVER.MAX_ITER": cfg.SOLVER.MAX_ITER, "SOLVER.IMS_PER_BATCH": cfg.SOLVER.IMS_PER_BATCH}
    else:
        batch = cfg.dataloader.train.total_batch_size
        values = {"train.max_iter": cfg.train.max_iter, "dataloader.train.total_batch_size": batch}
    for key, value in values.items():
        if value < 1:
            raise ValueError(f"{key} must be at least 1, got {value}")
    metric = TrainingSettings.from_config(cfg).best_metric
    # Evaluators of other projects may give anything.
    if metric and "/" not in metric and _has_own_evaluator(cfg):
        raise ValueError(
            "the best metric (TEST.BEST_METRIC, train.best_metric) must be one of metrics.json, such as bbox/AP, "
            f"got {metric!r}; did you mean bbox/{metric}?"
        )


def _train_datasets(cfg: CfgNode | DictConfig) -> Sequence[str]:
    if isinstance(cfg, CfgNode):
        return cfg.DATASETS.TRAIN
    # Loaders of other projects may have none.
    names = OmegaConf.select(cfg, "dataloader.train.dataset.names") or ()
    return (names,) if isinstance(names, str) else names


def _test_datasets(cfg: CfgNode | DictConfig) -> Sequence[str]:
    if isinstance(cfg, CfgNode):
        return cfg.DATASETS.TEST
    if "evaluator" not in cfg.dataloader:
        return ()
    return (cfg.dataloader.evaluator.get("dataset_name"),)


def _has_own_evaluator(cfg: CfgNode | DictConfig) -> bool:
    """Whether :func:`build_evaluator` makes the evaluator, if there is one."""
    if isinstance(cfg, CfgNode) or "evaluator" not in cfg.dataloader:
        return True
    target = cfg.dataloader.evaluator["_target_"]
    return (locate(target) if isinstance(target, str) else target) is build_evaluator
