"""Training and evaluation for both of Detectron2's configuration systems."""

import argparse
import logging
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
)
from detectron2.engine.hooks import CallbackHook
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from omegaconf import DictConfig
from torch import nn

from . import solver
from .config import KEYS, RunConfig
from .data.augmentation import augmentation_from_config
from .data.datasets import get_class_names, get_test_dicts, get_train_dicts
from .data.evaluators import build_evaluator
from .data.loader import TrainLoader
from .data.mapper import NamedErrorsMapper
from .data.sampler import sampler_from_config
from .modeling import SetPredictionDetector, prepare_for_inference
from .startup.checks import check_classes, check_unused_parameters, largest_image
from .startup.console import log_start, set_up_missing_loggers
from .startup.launch import launch
from .startup.options import check_options
from .startup.setup import argument_parser, configured_device, setup
from .training.auto_batch import AutoBatch
from .training.checkpointer import DeformableDETRCheckpointer
from .training.data_sheet import DataSheet
from .training.earlier_run import set_aside_earlier_run
from .training.early_stopping import ending_early
from .training.failure import replay
from .training.hooks import PreciseBN, build_hooks
from .training.loop import TrainingLoop
from .training.metrics import cut_metrics
from .training.per_layer_ap import EveryLayer, LayerEvaluators
from .training.precision import DTYPES, Precision
from .training.settings import TrainingSettings, warn_of_unscaled_learning_rate
from .training.step import unwrap
from .training.writers import build_writers

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's trainer around our :class:`TrainingLoop`, for yaml configurations.

    Attributes:
        loop: makes the steps.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # Past DefaultTrainer, which would make a loop and a checkpointer of its own.
        TrainerBase.__init__(self)
        set_up_missing_loggers(cfg.OUTPUT_DIR)
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        run = RunConfig(cfg)
        check_options(run)
        # Those to train on are compared once they are loaded.
        check_classes(run, run.evaluated_datasets(), read=True)
        warn_of_unscaled_learning_rate(cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH)
        model = self.build_model(cfg)
        check_unused_parameters(model, cfg)
        optimizer = self.build_optimizer(cfg, model)
        # Before the data, reading which takes its time: these may refuse the configuration.
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        settings = TrainingSettings.from_config(cfg)
        loader = self.build_train_loader(cfg)
        ddp = {"broadcast_buffers": False, "find_unused_parameters": cfg.SOLVER.FIND_UNUSED_PARAMETERS}
        loop = TrainingLoop(_distribute(model, **ddp), loader, optimizer, settings)
        # DefaultTrainer's own name: its run_step, model, data_loader and optimizer ask for it. There is no public one.
        self.loop = self._trainer = loop
        log_start(run, unwrap(loop.model), num_images=getattr(loader, "num_images", None))
        self.checkpointer = _build_checkpointer(cfg, loop.model, trainer=weakref.proxy(self), ema=loop.ema)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module):
        return solver.build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return solver.build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        node = cfg.MODEL.DEFORMABLE_DETR
        dataset = get_train_dicts(
            cfg.DATASETS.TRAIN,
            num_classes=node.NUM_CLASSES,
            num_queries=node.NUM_QUERIES,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )
        return TrainLoader(
            dataset,
            mapper=_build_mapper(cfg, is_train=True),
            sampler=sampler_from_config(cfg, dataset),
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_detection_test_loader(
            get_test_dicts(dataset_name, max_detections=cfg.TEST.DETECTIONS_PER_IMAGE),
            mapper=_build_mapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_evaluator(dataset_name, output_dir, max_detections=cfg.TEST.DETECTIONS_PER_IMAGE)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:
        settings = TrainingSettings.from_config(cfg)
        precision = Precision.of(settings, model)
        if settings.per_layer_ap and evaluators is None:
            model = EveryLayer(model, key=settings.keys["per_layer_ap"])
            evaluators = [
                LayerEvaluators([cls.build_evaluator(cfg, name) for _ in range(model.num_layers)])
                for name in cfg.DATASETS.TEST
            ]
        with precision.autocast():
            return super().test(cfg, model, evaluators)

    def build_hooks(self) -> list[HookBase]:
        def evaluate() -> dict:
            results = self.test(self.cfg, self.loop.evaluated_model)
            # DefaultTrainer's train compares them with TEST.EXPECTED_RESULTS, and returns them.
            self._last_eval_results = results
            return results

        hooks = build_hooks(
            self.loop.settings,
            self.checkpointer,
            scheduler=self.scheduler,
            evaluate=evaluate,
            build_writers=self.build_writers,
            before_saving=self._build_precise_bn(),
        )
        return [*_before_first_step(self.cfg, self.loop), *hooks]

    def build_writers(self) -> list[EventWriter]:
        """Build the writers to the terminal, to ``metrics.json``, TensorBoard and so on, in the main process."""
        return _build_writers(self.cfg, self.loop.settings)

    def _build_precise_bn(self) -> list[HookBase]:
        loop, node = self.loop, self.cfg.TEST.PRECISE_BN
        if not node.ENABLED or not get_bn_modules(loop.model):
            return []
        period = self.cfg.TEST.EVAL_PERIOD
        models = (loop.model, loop.evaluated_model) if loop.ema else (loop.model,)
        return [PreciseBN(loop, model, period=period, num_iter=node.NUM_ITER) for model in models]

    def train(self) -> dict | None:
        return ending_early(super().train)

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        _go_on_from(self.start_iter, self.cfg)

    def state_dict(self) -> dict[str, Any]:
        # As DefaultTrainer's own since version 0.6, which has none.
        return {**TrainerBase.state_dict(self), "_trainer": self.loop.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        self.loop.load_state_dict(state_dict["_trainer"])


def main(args: argparse.Namespace) -> Any:
    """Train, evaluate with ``--eval-only``, or repeat a failed step with ``--replay``; runs in every process."""
    cfg = setup(args)
    if args.replay:
        return _replay(cfg, args.replay)
    if isinstance(cfg, CfgNode):
        return _run_yaml(cfg, args)
    if not args.eval_only:
        return do_train(cfg, resume=args.resume)
    return do_eval(cfg, resume=args.resume, precision=args.precision, cuda_graphs=args.cuda_graphs)


def train_net(argv: Sequence[str] | None = None) -> None:
    """Run the command line of ``train_net.py``: start :func:`main` in as many processes as are asked for."""
    args = argument_parser().parse_args(argv)
    launch(main, args, **configured_device(args))


def _replay(cfg: CfgNode | DictConfig, path: str) -> str:
    model = Trainer.build_model(cfg) if isinstance(cfg, CfgNode) else instantiate(cfg.model).to(cfg.train.device)
    explanation = replay(path, model, TrainingSettings.from_config(cfg))
    logger.info(explanation)
    return explanation


def _run_yaml(cfg: CfgNode, args: argparse.Namespace) -> Any:
    cfg.freeze()
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = _build_checkpointer(cfg, model)
        checkpointer.load_to_detect(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, _prepare(model, cfg, args.precision, args.cuda_graphs))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def do_test(cfg: DictConfig, model: nn.Module) -> dict | None:
    """Evaluate a model on the LazyConfig's ``dataloader.test``; None where it has no dataset or no evaluator."""
    if not RunConfig(cfg).evaluated_datasets():
        return None
    settings = TrainingSettings.from_config(cfg)
    precision = Precision.of(settings, model)
    if settings.per_layer_ap:
        model = EveryLayer(model, key=settings.keys["per_layer_ap"])
        evaluator = LayerEvaluators([_build_lazy_evaluator(cfg) for _ in range(model.num_layers)])
    else:
        evaluator = _build_lazy_evaluator(cfg)
    with precision.autocast():
        results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _build_lazy_evaluator(cfg: DictConfig) -> DatasetEvaluator:
    built = instantiate(RunConfig(cfg).lazy_evaluators())
    return built[0] if len(built) == 1 else DatasetEvaluators(built)


def do_eval(
    cfg: DictConfig, *, resume: bool = False, precision: str | None = None, cuda_graphs: bool = False
) -> dict | None:
    """Build the LazyConfig's model, load ``train.init_checkpoint`` and evaluate.

    Args:
        resume: evaluate the last checkpoint in ``train.output_dir`` instead if there is one.
        precision: "float32", "bfloat16" or "float16"; by default what the configuration trains in.
        cuda_graphs: see :func:`deformable_detr.prepare_for_inference`.
    """
    model = _distribute(instantiate(cfg.model).to(cfg.train.device))
    checkpointer = _build_checkpointer(cfg, model)
    checkpointer.load_to_detect(cfg.train.init_checkpoint, resume=resume)
    return do_test(cfg, _prepare(model, cfg, precision, cuda_graphs))


def _prepare(model: nn.Module, cfg: CfgNode | DictConfig, precision: str | None, cuda_graphs: bool) -> nn.Module:
    """Return what evaluates a model that is not trained any more: a copy prepared for it.

    The model itself where the AP of every layer is asked for, and where it is no :class:`SetPredictionDetector`.
    """
    settings = TrainingSettings.from_config(cfg)
    if settings.per_layer_ap or not isinstance(unwrap(model), SetPredictionDetector):
        if precision or cuda_graphs:
            raise ValueError(
                f"--precision and --cuda-graphs need a DeformableDETR or a DETR and {settings.keys['per_layer_ap']} "
                f"False, got {type(unwrap(model)).__name__} and {settings.per_layer_ap}"
            )
        return model
    dtype = {"float32": torch.float32, **DTYPES, None: Precision.of(settings, model).dtype}[precision]
    return prepare_for_inference(unwrap(model), dtype=dtype, cuda_graphs=cuda_graphs)


def do_train(cfg: DictConfig, *, resume: bool = False) -> None:
    """Train as a LazyConfig says, with the loop and the hooks of yaml configurations.

    Args:
        cfg: has ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader`` and ``train``.
        resume: continue from the last checkpoint in ``train.output_dir`` if there is one.
    """
    run, settings = RunConfig(cfg), TrainingSettings.from_config(cfg)
    scheduler = solver.build_lr_multiplier(cfg.lr_multiplier)
    lr, batch = run.get("lr"), run.get("batch")
    # Loaders and optimisers of other projects may call them otherwise.
    if lr is not None and batch is not None:
        warn_of_unscaled_learning_rate(lr, batch)
    model = instantiate(cfg.model).to(cfg.train.device)
    logging.getLogger("detectron2").info(f"Model:\n{model}")
    check_unused_parameters(model, cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = _distribute(model, **cfg.train.get("ddp", {}))
    loop = TrainingLoop(model, instantiate(cfg.dataloader.train), optimizer, settings)
    log_start(run, unwrap(loop.model), num_images=getattr(loop.data_loader, "num_images", None))
    checkpointer = _build_checkpointer(cfg, loop.model, trainer=loop, ema=loop.ema)
    loop.register_hooks(_before_first_step(cfg, loop))
    loop.register_hooks(
        build_hooks(
            settings,
            checkpointer,
            scheduler=scheduler,
            evaluate=lambda: do_test(cfg, loop.evaluated_model),
            build_writers=lambda: _build_lazy_writers(cfg, settings),
        )
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    # A checkpoint stores the iteration it has finished.
    start = loop.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    _go_on_from(start, cfg)
    ending_early(loop.train, start, cfg.train.max_iter)


def _go_on_from(start: int, cfg: CfgNode | DictConfig) -> None:
    """Take out of the metrics what a resumed run writes again; of a new one, set aside what an earlier run has left.

    Raises:
        ValueError: if it has done more iterations than it is to have. Its last checkpoint, which is in the middle of
            some other schedule, would be called final.
    """
    run = RunConfig(cfg)
    if start > run.get("max_iter"):
        raise ValueError(
            f"{run.key('max_iter')} is {run.get('max_iter')}, but the last checkpoint in {run.get('output_dir')} has "
            f"done {start} iterations: set it to {start} to end the run there. Where it follows from the number of "
            "GPUs, go on with as many as before"
        )
    if comm.is_main_process() and start > 0:
        cut_metrics(run.get("output_dir"), start - 1)
    elif comm.is_main_process():
        set_aside_earlier_run(run.get("output_dir"), run.get("weights") or "")


def _build_lazy_writers(cfg: DictConfig, settings: TrainingSettings) -> list[EventWriter]:
    return _build_writers(cfg, settings) + [instantiate(writer) for writer in cfg.train.get("writers", ())]


def _build_writers(cfg: CfgNode | DictConfig, settings: TrainingSettings) -> list[EventWriter]:
    run = RunConfig(cfg)
    values = {run.key(name): run.get(name) for name in KEYS if run.key(name)}
    wandb = {
        "project": settings.wandb_project,
        "name": settings.wandb_name or os.path.basename(os.path.abspath(settings.output_dir)),
        "dir": settings.output_dir,
        "config": {key: value for key, value in values.items() if isinstance(value, bool | int | float | str | tuple)},
    }
    return build_writers(
        settings.output_dir, run.get("max_iter"), settings.log_period, wandb=wandb if settings.wandb_enabled else None
    )


def _before_first_step(cfg: CfgNode | DictConfig, loop: TrainingLoop) -> list[HookBase]:
    """Hooks that are asked for and have done their work when the first step begins."""
    run, hooks = RunConfig(cfg), []
    if loop.ema:
        hooks.append(CallbackHook(before_train=lambda _: loop.ema.start(loop.model)))
    if loop.settings.auto_batch:
        hooks.append(AutoBatch(loop, largest_image(run), sizes_key=run.key("max_size_train")))
    if loop.settings.show_data:
        hooks.append(DataSheet(loop, get_class_names(cfg)))
    return hooks


def _distribute(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Detectron2's DistributedDataParallel, where there are several processes, also on the CPU."""
    if next(model.parameters()).device.type == "cpu":
        kwargs["device_ids"] = None
    return create_ddp_model(model, **kwargs)


def _build_checkpointer(
    cfg: CfgNode | DictConfig, model: nn.Module, **checkpointables: Any
) -> DeformableDETRCheckpointer:
    run = RunConfig(cfg)
    present = {name: value for name, value in checkpointables.items() if value is not None}
    return DeformableDETRCheckpointer(
        model, run.get("output_dir"), class_names=get_class_names(cfg), weights_key=run.key("weights"), **present
    )


def _build_mapper(cfg: CfgNode, *, is_train: bool) -> NamedErrorsMapper:
    return NamedErrorsMapper(cfg, is_train, augmentations=augmentation_from_config(cfg, is_train=is_train))
