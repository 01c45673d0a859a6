"""What the training loop takes from a configuration, read from yaml and LazyConfig alike."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from detectron2.config import CfgNode
from omegaconf import DictConfig

from ..config import KEYS, RunConfig

logger = logging.getLogger(__name__)

# The official recipe (16 GPUs x 2 images).
RECIPE_LR = 2e-4
RECIPE_BATCH = 32
# Of the averaged weights, in a LazyConfig that asks for them and says no more.
EMA_DECAY = 0.9997


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a run; periods are in iterations.

    Attributes:
        seed: below 0 it is drawn when the run starts. Resumed runs go on with the seed of their checkpoint.
        amp_precision: "float16" or "bfloat16", used where ``amp_enabled``.
        accumulation_steps: parts in which the batch of a process goes through the model.
        max_skipped_steps: steps with a non-finite loss or gradient that are left out before the run stops.
        ema_decay: of the averaged weights, None without them.
        first_eval: one evaluation more, early, after so many iterations; 0 for none.
        compile: the transformer for training; see :meth:`SetPredictionDetector.compile_for_training`.
        cuda_graphs: see :meth:`SetPredictionDetector.record_for_training`.
        per_layer_ap: also evaluate the predictions of every decoder layer.
        best_metric: such as "bbox/AP"; the checkpoint that is best in it is kept as ``model_best.pth``. Empty: none.
        patience: evaluations without a better one after which the run ends; 0 for never.
        auto_batch: see :class:`AutoBatch`.
        show_data: see :class:`DataSheet`.
        wandb_enabled, wandb_project, wandb_name: see :class:`WandbWriter`.
        keys: of these settings in the user's configuration, for error texts; those of yaml where there is none.
    """

    output_dir: str
    seed: int = -1
    amp_enabled: bool = False
    amp_precision: str = "float16"
    accumulation_steps: int = 1
    max_skipped_steps: int = 0
    ema_decay: float | None = None
    compile: bool = False
    cuda_graphs: bool = False
    log_period: int = 20
    eval_period: int = 0
    first_eval: int = 0
    per_layer_ap: bool = False
    checkpoint_period: int = 5000
    max_to_keep: int | None = None
    best_metric: str = ""
    patience: int = 0
    auto_batch: bool = False
    show_data: bool = False
    wandb_enabled: bool = False
    wandb_project: str = "deformable_detr"
    wandb_name: str = ""
    keys: Mapping[str, str] = field(
        default_factory=lambda: {name: yaml_key for name, (yaml_key, _) in KEYS.items()}, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        for name in ("accumulation_steps", "log_period", "checkpoint_period"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.keys[name]} must be at least 1, got {getattr(self, name)}")
        if self.max_skipped_steps < 0:
            raise ValueError(f"{self.keys['max_skipped_steps']} must be at least 0, got {self.max_skipped_steps}")
        if self.patience < 0 or (self.patience and self.eval_period <= 0):
            raise ValueError(
                f"{self.keys['patience']} must be at least 0, and needs evaluations ({self.keys['eval_period']}), got "
                f"{self.patience} and {self.eval_period}"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"{self.keys['ema_decay']} must be in [0, 1), got {self.ema_decay}")
        for name in ("compile", "auto_batch") if self.cuda_graphs else ():
            if getattr(self, name):
                raise ValueError(f"{self.keys['cuda_graphs']} does not go with {self.keys[name]}: both are True")

    @classmethod
    def from_config(cls, cfg: CfgNode | DictConfig) -> "TrainingSettings":
        """Read the settings; keys that a LazyConfig does not have keep their defaults.

        Raises:
            ValueError: on a value out of its range.
        """
        run = RunConfig(cfg)
        values = {field.name: run.get(field.name) for field in fields(cls) if field.name in KEYS}
        values["ema_decay"] = run.get("ema_decay", EMA_DECAY) if run.get("ema_enabled") else None
        return cls(**{name: value for name, value in values.items() if value is not None}, keys=run.keys)


def warn_of_unscaled_learning_rate(lr: float, batch: int) -> None:
    """Warn where the recipe's learning rate is used with a batch it was not made for.

    Other learning rates are somebody's choice, and right for them.

    Args:
        lr: of the transformer.
        batch: images per iteration, over all processes.
    """
    factor = batch / RECIPE_BATCH
    if math.isclose(lr, RECIPE_LR) and not 0.5 <= factor <= 2:
        logger.warning(
            f"The learning rate is {lr:g}, the recipe's for a batch of {RECIPE_BATCH}, but the batch is {batch}: it "
            f"would be {RECIPE_LR:g} x {batch}/{RECIPE_BATCH} = {RECIPE_LR * factor:g}. Gradient accumulation makes "
            f"a batch of {RECIPE_BATCH} fit on one device"
        )
