"""A schedule for the data at hand: so many epochs, with a learning rate that fits the batch."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig

from ..config import get_device, get_value, overridden_keys, set_value

logger = logging.getLogger(__name__)

# Epochs of fine-tuning where nothing else is said.
FINETUNE_EPOCHS = 25
# The learning rate drops after this share of all iterations, as after 40 of the official 50 epochs.
DROP_PERCENT = 80
# Meant for a GPU of 12 GB, hence in mixed precision: in float32 the authors saw 2 images exceed 11 GB now and then
# (fundamentalvision/Deformable-DETR issue 1).
IMAGES_PER_GPU = 2
# Evaluations, and checkpoints, of a whole run.
_MAX_EVALUATIONS = 10

_YAML_KEYS = {
    "batch": "SOLVER.IMS_PER_BATCH",
    "lr": "SOLVER.BASE_LR",
    "max_iter": "SOLVER.MAX_ITER",
    "drop": "SOLVER.STEPS",
    "amp": "SOLVER.AMP.ENABLED",
    "eval_period": "TEST.EVAL_PERIOD",
    "checkpoint_period": "SOLVER.CHECKPOINT_PERIOD",
}
_LAZY_KEYS = {
    "batch": "dataloader.train.total_batch_size",
    "lr": "optimizer.lr",
    "max_iter": "train.max_iter",
    "drop": "lr_multiplier.scheduler.milestones",
    "amp": "train.amp.enabled",
    "eval_period": "train.eval_period",
    "checkpoint_period": "train.checkpointer.period",
}


def plan_schedule(
    *, num_images: int, epochs: int, batch: int, reference_lr: float, reference_batch: int
) -> dict[str, Any]:
    """Compute a schedule.

    Args:
        num_images: training images.
        batch: images per iteration, over all GPUs.
        reference_lr: learning rate that is right at ``reference_batch``; it scales linearly with the batch, as
            ``SOLVER.REFERENCE_WORLD_SIZE`` of Detectron2 does.

    Returns:
        "batch", "lr", "max_iter", "drop", "eval_period" and "checkpoint_period"; the last four in iterations.
    """
    for name, value in {"num_images": num_images, "epochs": epochs, "batch": batch}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    per_epoch = math.ceil(num_images / batch)
    max_iter = epochs * per_epoch
    period = per_epoch * math.ceil(epochs / _MAX_EVALUATIONS)
    return {
        "batch": batch,
        "lr": reference_lr * batch / reference_batch,
        "max_iter": max_iter,
        "drop": max_iter * DROP_PERCENT // 100,
        "eval_period": period,
        "checkpoint_period": period,
    }


def apply_schedule(
    cfg: CfgNode | DictConfig,
    *,
    reference: CfgNode | DictConfig,
    epochs: int,
    num_images: int,
    num_gpus: int,
    opts: Sequence[str] = (),
) -> None:
    """Give a configuration a schedule of some epochs; what the user set on the command line stays as it is.

    The batch is ``IMAGES_PER_GPU`` for every GPU, never above the configuration's, in mixed precision on GPUs.

    Args:
        cfg: the configuration with ``opts`` applied; changed.
        reference: the configuration as in its file, whose learning rate and batch fit each other.
        num_images: training images.
        num_gpus: over all machines; 0 counts as one.
        opts: the user's overrides.
    """
    is_yaml = isinstance(cfg, CfgNode)
    keys = dict(_YAML_KEYS if is_yaml else _LAZY_KEYS)
    if not _has_steps(cfg):
        del keys["drop"]  # A cosine follows the number of iterations by itself.
    overridden = overridden_keys(cfg, opts)
    given = {name for name, key in keys.items() if key in overridden}
    file_batch, file_lr = get_value(reference, keys["batch"]), get_value(reference, keys["lr"])
    batch = get_value(cfg, keys["batch"]) if "batch" in given else min(file_batch, IMAGES_PER_GPU * max(num_gpus, 1))
    plan = plan_schedule(
        num_images=num_images, epochs=epochs, batch=batch, reference_lr=file_lr, reference_batch=file_batch
    )
    drop = f", dropped after iteration {plan['drop']} ({DROP_PERCENT} %)" if "drop" in keys else ""
    logger.info(
        f"Schedule: {epochs} epochs of {num_images} images in batches of {batch} are {plan['max_iter']} iterations. "
        f"Learning rate {plan['lr']:g} = {file_lr:g} x {batch}/{file_batch}{drop}. "
        f"Evaluation and checkpoint every {plan['eval_period']} iterations."
    )
    if given:
        logger.info("Left as set on the command line: %s", ", ".join(keys[name] for name in sorted(given)))
    plan["drop"] = (plan["drop"],) if is_yaml else [plan["drop"], plan["max_iter"]]
    plan["amp"] = get_device(cfg).startswith("cuda")
    for name in keys.keys() - given:
        set_value(cfg, keys[name], plan[name])


def _has_steps(cfg: CfgNode | DictConfig) -> bool:
    if isinstance(cfg, CfgNode):
        return cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    return "milestones" in cfg.lr_multiplier.scheduler
