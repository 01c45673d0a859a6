"""Training and evaluation for both of Detectron2's configuration systems."""

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from . import solver
from .checkpoint.checkpointer import DeformableDETRCheckpointer
from .config import load_config
from .data import NamedErrorsMapper, augmentation_from_config, get_class_names, get_train_dicts
from .user_data import add_user_data_arguments, apply_user_data

# COCO's panoptic datasets carry boxes in the same format as its detection datasets.
EVALUATOR_TYPES = ("coco", "coco_panoptic_seg", "lvis", "pascal_voc")

EPILOG = """
Examples:
  Train on 8 GPUs:      train_net.py --num-gpus 8 --config-file configs/COCO-Detection/deformable_detr_R_50.yaml
  Continue a run:       add --resume
  Evaluate:             train_net.py --eval-only --config-file FILE --weights model.pth
  Your own COCO data:   add --train-json a.json --train-images a/ --val-json b.json --val-images b/
  Fine-tune on it:      add --weights deformable-detr://deformable_detr_R_50 as well
  Change a value:       add KEY VALUE pairs (yaml) or key=value (LazyConfig .py)
"""


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments and those for the user's own data and weights."""
    parser = default_argument_parser(EPILOG)
    add_user_data_arguments(parser)
    return parser


def setup(args: argparse.Namespace) -> CfgNode | DictConfig:
    """Read the configuration, register the user's data, and start logging into the output folder."""
    if not args.config_file:
        raise ValueError("--config-file is required")
    cfg = load_config(args.config_file, args.opts)
    output_dir = cfg.OUTPUT_DIR if isinstance(cfg, CfgNode) else cfg.train.output_dir
    # default_setup gives a handler to the loggers of detectron2 and fvcore only.
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="deformable_detr")
    apply_user_data(cfg, args)
    if isinstance(cfg, CfgNode):
        cfg.freeze()
    default_setup(cfg, args)
    return cfg


def build_evaluator(dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluator for a dataset's ``evaluator_type``: COCO, LVIS or Pascal VOC.

    Raises:
        KeyError: if the dataset is not registered.
        NotImplementedError: on another type, or a dataset without one.
        ModuleNotFoundError: if the evaluator needs a package that is not installed.
    """
    if dataset_name not in DatasetCatalog:
        raise KeyError(f"dataset {dataset_name!r} is not registered; registered are {sorted(DatasetCatalog.list())}")
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if evaluator_type not in EVALUATOR_TYPES:
        raise NotImplementedError(
            f"dataset {dataset_name!r} has evaluator_type {evaluator_type!r}; supported are {EVALUATOR_TYPES}"
        )
    if evaluator_type == "lvis":
        try:
            return LVISEvaluator(dataset_name, tasks=("bbox",), output_dir=output_dir)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"evaluating dataset {dataset_name!r} needs the package {error.name!r}: pip install {error.name}"
            ) from error
    if evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    return COCOEvaluator(dataset_name, tasks=("bbox",), output_dir=output_dir)


class Trainer(DefaultTrainer):
    """Detectron2's trainer with DETR's optimiser, augmentation and evaluators, for yaml configurations."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module):
        return solver.build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        dataset = get_train_dicts(
            cfg.DATASETS.TRAIN,
            num_classes=cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )
        return build_detection_train_loader(cfg, dataset=dataset, mapper=_build_mapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_detection_test_loader(cfg, dataset_name, mapper=_build_mapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))

    def build_hooks(self) -> list:
        # DefaultTrainer makes its own checkpointer right before it asks for the hooks that use it.
        self.checkpointer = DeformableDETRCheckpointer(
            self._trainer.model,
            self.cfg.OUTPUT_DIR,
            class_names=get_class_names(self.cfg),
            trainer=self.checkpointer.checkpointables["trainer"],
        )
        return super().build_hooks()

    # Detectron2 0.6 leaves the optimiser out of DefaultTrainer's checkpoints: resuming would lose its moments. Later
    # versions save it under this name.
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])


def main(args: argparse.Namespace) -> Any:
    """Train, or evaluate with ``--eval-only``; runs in every process that Detectron2 launches."""
    cfg = setup(args)
    if not build_evaluators(cfg) and args.eval_only:
        raise ValueError("--eval-only needs a dataset to evaluate on, in the configuration or with --val-json")
    if isinstance(cfg, CfgNode):
        return _run_yaml(cfg, args)
    return do_eval(cfg, resume=args.resume) if args.eval_only else do_train(cfg, resume=args.resume)


def build_evaluators(cfg: CfgNode | DictConfig) -> list[DatasetEvaluator]:
    """All evaluators of a configuration.

    Built before training, an evaluator that cannot work fails then, and not when training has ended;
    DefaultTrainer.test would only warn.
    """
    if isinstance(cfg, CfgNode):
        return [Trainer.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
    return [instantiate(cfg.dataloader.evaluator)] if "evaluator" in cfg.dataloader else []


def _run_yaml(cfg: CfgNode, args: argparse.Namespace) -> Any:
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = DeformableDETRCheckpointer(model, save_dir=cfg.OUTPUT_DIR, class_names=get_class_names(cfg))
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def do_test(cfg: DictConfig, model: nn.Module) -> dict | None:
    """Evaluate a model on the LazyConfig's ``dataloader.test``; None where there is no ``dataloader.evaluator``."""
    if "evaluator" not in cfg.dataloader:
        return None
    evaluator = instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def do_eval(cfg: DictConfig, *, resume: bool = False) -> dict | None:
    """Build the LazyConfig's model, load ``train.init_checkpoint`` and evaluate.

    Args:
        resume: evaluate the last checkpoint in ``train.output_dir`` instead if there is one.
    """
    model = instantiate(cfg.model).to(cfg.train.device)
    model = create_ddp_model(model)
    checkpointer = DeformableDETRCheckpointer(model, cfg.train.output_dir, class_names=get_class_names(cfg))
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return do_test(cfg, model)


def do_train(cfg: DictConfig, *, resume: bool = False) -> None:
    """Train as a LazyConfig says, with the hooks of Detectron2's own LazyConfig script.

    Args:
        cfg: has ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader`` and ``train``.
        resume: continue from the last checkpoint in ``train.output_dir`` if there is one.
    """
    model = instantiate(cfg.model).to(cfg.train.device)
    logging.getLogger("detectron2").info(f"Model:\n{model}")
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = DeformableDETRCheckpointer(
        model, cfg.train.output_dir, class_names=get_class_names(cfg), trainer=trainer
    )
    evaluate = hooks.EvalHook(cfg.train.eval_period, lambda: do_test(cfg, model))
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            *_main_process(lambda: hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)),
            evaluate,
            *_main_process(lambda: _writer(cfg)),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    # A checkpoint stores the iteration it has finished.
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)


def _writer(cfg: DictConfig) -> hooks.PeriodicWriter:
    return hooks.PeriodicWriter(default_writers(cfg.train.output_dir, cfg.train.max_iter), period=cfg.train.log_period)


def _main_process(build) -> Sequence:
    return [build()] if comm.is_main_process() else []


def _build_mapper(cfg: CfgNode, *, is_train: bool) -> NamedErrorsMapper:
    return NamedErrorsMapper(cfg, is_train, augmentations=augmentation_from_config(cfg, is_train=is_train))
