"""One view of a configuration, whichever of Detectron2's two systems it is written in."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig

# Name of a setting: its key in yaml, its key in a LazyConfig.
KEYS: dict[str, tuple[str | None, str]] = {
    "output_dir": ("OUTPUT_DIR", "train.output_dir"),
    "device": ("MODEL.DEVICE", "train.device"),
    "seed": ("SEED", "train.seed"),
    "weights": ("MODEL.WEIGHTS", "train.init_checkpoint"),
    "num_classes": ("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "model.num_classes"),
    "size_divisibility": ("MODEL.DEFORMABLE_DETR.SIZE_DIVISIBILITY", "model.size_divisibility"),
    # Tuples of names; a LazyConfig may have one name in place of a list.
    "train_datasets": ("DATASETS.TRAIN", "dataloader.train.dataset.names"),
    "test_datasets": ("DATASETS.TEST", "dataloader.test.dataset.names"),
    "batch": ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
    "num_workers": ("DATALOADER.NUM_WORKERS", "dataloader.train.num_workers"),
    "lr": ("SOLVER.BASE_LR", "optimizer.lr"),
    "max_iter": ("SOLVER.MAX_ITER", "train.max_iter"),
    # Iterations at which the learning rate drops, and the last one, which a LazyConfig may have as num_updates; a
    # schedule without steps has none.
    "milestones": ("SOLVER.STEPS", "lr_multiplier.scheduler.milestones"),
    "amp_enabled": ("SOLVER.AMP.ENABLED", "train.amp.enabled"),
    "amp_precision": ("SOLVER.AMP.PRECISION", "train.amp.precision"),
    "accumulation_steps": ("SOLVER.ACCUMULATION_STEPS", "train.accumulation_steps"),
    "find_unused_parameters": ("SOLVER.FIND_UNUSED_PARAMETERS", "train.ddp.find_unused_parameters"),
    "compile": ("MODEL.DEFORMABLE_DETR.COMPILE", "train.compile"),
    "cuda_graphs": ("MODEL.DEFORMABLE_DETR.CUDA_GRAPHS", "train.cuda_graphs"),
    "max_skipped_steps": ("SOLVER.MAX_SKIPPED_STEPS", "train.max_skipped_steps"),
    "ema_enabled": ("MODEL.EMA.ENABLED", "train.ema.enabled"),
    "ema_decay": ("MODEL.EMA.DECAY", "train.ema.decay"),
    "log_period": ("SOLVER.LOG_PERIOD", "train.log_period"),
    "eval_period": ("TEST.EVAL_PERIOD", "train.eval_period"),
    "first_eval": ("TEST.FIRST_EVAL", "train.first_eval"),
    "per_layer_ap": ("TEST.PER_LAYER_AP", "train.per_layer_ap"),
    "best_metric": ("TEST.BEST_METRIC", "train.best_metric"),
    "auto_batch": ("SOLVER.AUTO_BATCH", "train.auto_batch"),
    "show_data": ("DATALOADER.SHOW_DATA", "train.show_data"),
    "wandb_enabled": ("WANDB.ENABLED", "train.wandb.enabled"),
    "wandb_project": ("WANDB.PROJECT", "train.wandb.project"),
    "wandb_name": ("WANDB.NAME", "train.wandb.name"),
    "min_size_train": ("INPUT.MIN_SIZE_TRAIN", "dataloader.train.mapper.augmentations.min_size"),
    "max_size_train": ("INPUT.MAX_SIZE_TRAIN", "dataloader.train.mapper.augmentations.max_size"),
    "lsj_size": ("INPUT.LSJ.SIZE", "dataloader.train.mapper.augmentations.lsj_size"),
    "patience": ("TEST.PATIENCE", "train.patience"),
    "checkpoint_period": ("SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period"),
    # Detectron2's yaml has no such key: every checkpoint is kept.
    "max_to_keep": (None, "train.checkpointer.max_to_keep"),
}


class RunConfig:
    """A configuration of either system, its settings under the names of :data:`KEYS`.

    Args:
        cfg: a CfgNode or a LazyConfig, or what ``LazyConfig.load`` makes of the ``config.yaml`` that a run of either
            kind has left.
        opts: the user's overrides, as for :func:`load_config`; ``cfg`` has them already.
    """

    def __init__(self, cfg: CfgNode | DictConfig, opts: Sequence[str] = ()) -> None:
        self.cfg = cfg
        # The plain data of a yaml run's file are no CfgNode, but no LazyConfig has this section.
        self._is_yaml = isinstance(cfg, CfgNode) or "MODEL" in cfg
        self._overridden = set(opts[::2] if self._is_yaml else (opt.partition("=")[0].lstrip("+") for opt in opts))

    @property
    def keys(self) -> dict[str, str]:
        """The key of every setting in the user's system, for error texts."""
        return {name: pair[0 if self._is_yaml else 1] for name, pair in KEYS.items()}

    def key(self, name: str) -> str:
        """Return the key of a setting in the user's system, for error texts."""
        return self.keys[name]

    def overridden(self, name: str) -> bool:
        """Whether the user has set this on the command line."""
        return self.key(name) in self._overridden

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a setting; ``default`` where the configuration does not have it."""
        value = self._find(self.key(name))
        if value is None:
            return default
        if name.endswith("_datasets"):
            return (value,) if isinstance(value, str) else tuple(value)
        if name == "milestones":
            return self._with_end(value) or default
        return value

    def _with_end(self, milestones: Sequence[int]) -> tuple[int, ...]:
        """Return the drops and the end of a schedule; nothing of one without steps."""
        if self._is_yaml:
            has_steps = self.cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
            return (*milestones, self.get("max_iter")) if has_steps else ()
        end = self._find("lr_multiplier.scheduler.num_updates")
        milestones = (*milestones, end) if end is not None else tuple(milestones)
        return milestones if len(milestones) > 1 else ()

    def set(self, name: str, value: Any) -> None:
        """Set a setting to a value of the form in which :meth:`get` returns it.

        Of a schedule with more drops than there are to be, the first shares of the learning rate stay.
        """
        if name == "milestones" and self._is_yaml:
            value = value[:-1]
        elif name == "milestones":
            value, scheduler = list(value), self._find("lr_multiplier.scheduler")
            scheduler.pop("num_updates", None)
            # A scheduler of another project may have none.
            if "values" in scheduler:
                scheduler["values"] = scheduler["values"][: len(value)]
        if name.endswith("_datasets") and not self._is_yaml:
            # A LazyConfig's evaluator takes one name.
            value = value[0] if len(value) == 1 else list(value)
        *parents, last = self.key(name).split(".")
        node = self.cfg
        for parent in parents:
            node = node[parent]
        node[last] = value

    def as_overrides(self, values: Mapping[str, Any]) -> list[str]:
        """Return settings as what a user would type, for :func:`load_config`."""
        if self._is_yaml:
            return [word for name, value in values.items() for word in (self.key(name), str(value))]
        return [f"+{self.key(name)}={value}" for name, value in values.items()]

    def evaluated_datasets(self) -> tuple[str | None, ...]:
        """Names of what is evaluated; None for an evaluator of another project that does not say.

        A LazyConfig evaluates where it has an evaluator, unless its test loader has an empty list of names.
        """
        if self._is_yaml:
            return self.get("test_datasets", ())
        if self.get("test_datasets") == ():
            return ()
        return tuple(dict.fromkeys(evaluator.get("dataset_name") for evaluator in self.lazy_evaluators()))

    def lazy_evaluators(self) -> list[DictConfig]:
        """Return a LazyConfig's ``dataloader.evaluator``, one or a list of them, as a list; none in yaml."""
        found = self.lazy_node("dataloader.evaluator")
        return [found] if isinstance(found, Mapping) else list(found or ())

    def lazy_node(self, key: str) -> DictConfig | None:
        """Return what a LazyConfig has under a key; None where it has nothing, and in yaml."""
        return None if self._is_yaml else self._find(key)

    def _find(self, key: str | None) -> Any:
        value = None if key is None else self.cfg
        for part in (key or "").split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value
