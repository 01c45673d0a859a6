"""A schedule for the data at hand: so many epochs, with a learning rate that fits the batch."""

import logging
import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from omegaconf import DictConfig

from ..config import RunConfig

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
_NAMES = ("batch", "lr", "max_iter", "milestones", "amp_enabled", "eval_period", "checkpoint_period")


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
        "batch", "lr", "max_iter", "drop" (0 for none), "eval_period" and "checkpoint_period"; the last four in
        iterations.
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
    run: RunConfig,
    *,
    reference: RunConfig,
    epochs: int,
    num_images: int,
    num_gpus: int,
    resumed_batch: int | None = None,
) -> None:
    """Give a configuration a schedule of some epochs; what the user set on the command line stays as it is.

    The batch is ``IMAGES_PER_GPU`` for every GPU, never above the configuration's, in mixed precision on GPUs; it is
    the configuration's where the parts that fit into a GPU are found out. The schedule is for this number of GPUs:
    ``SOLVER.REFERENCE_WORLD_SIZE`` is 0 then, and scales nothing once more.

    Args:
        run: the configuration with the user's overrides; changed.
        reference: the configuration as in its file, whose learning rate and batch fit each other.
        num_images: training images.
        num_gpus: over all machines; 0 counts as one.
        resumed_batch: of the run that goes on, perhaps on another number of GPUs: it stays, and with it the learning
            rate and the length. None where a run begins.

    Raises:
        ValueError: if the configuration has no batch or no learning rate, as some of other projects.
    """
    if lacking := [run.key(name) for name in ("batch", "lr") if reference.get(name) is None]:
        raise ValueError(f"a schedule for so many epochs needs {' and '.join(lacking)}, and the configuration has none")
    # A cosine follows the number of iterations by itself.
    names = [name for name in _NAMES if name != "milestones" or run.get("milestones") is not None]
    given = [name for name in names if run.overridden(name)]
    file_batch, file_lr = reference.get("batch"), reference.get("lr")
    fitting = file_batch if run.get("auto_batch") else min(file_batch, IMAGES_PER_GPU * max(num_gpus, 1))
    batch = run.get("batch") if "batch" in given else resumed_batch or fitting
    plan = plan_schedule(
        num_images=num_images, epochs=epochs, batch=batch, reference_lr=file_lr, reference_batch=file_batch
    )
    if "max_iter" in given:
        plan |= _fit_to(run.get("max_iter"), plan)
    # A single iteration has no room for a drop: whatever the file says of drops has no effect on it.
    plan["milestones"] = (plan["drop"], plan["max_iter"]) if plan["drop"] else run.get("milestones")
    plan["amp_enabled"] = run.get("device").startswith("cuda")
    for name in names:
        if name not in given:
            run.set(name, plan[name])
    # A LazyConfig has no such key.
    if "SOLVER" in run.cfg:
        run.cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    length = f"{epochs} epochs" if "max_iter" not in given else f"{plan['max_iter'] * batch / num_images:.3g} epochs"
    kept = " (the resumed run's)" if batch == resumed_batch else ""
    scaling = "" if "lr" in given else f" = {file_lr:g} x {batch}/{file_batch}"
    logger.info(
        f"Schedule: {length} of {num_images} images in batches of {batch}{kept} are {plan['max_iter']} iterations. "
        f"Learning rate {run.get('lr'):g}{scaling}{_describe_drops(run)}. {_describe_periods(run)}."
    )
    if given:
        logger.info("As set on the command line: %s", ", ".join(map(run.key, given)))


def scale_to_processes(cfg: CfgNode | DictConfig, num_processes: int) -> CfgNode | DictConfig:
    """Return the configuration with batch, rate and length as ``SOLVER.REFERENCE_WORLD_SIZE`` asks: Detectron2's rule.

    Raises:
        ValueError: if the batch cannot be divided among so many GPUs.
    """
    # A LazyConfig has no such key.
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE if "SOLVER" in cfg else 0
    if reference == 0:
        return cfg
    # Detectron2 tells of it by an assertion.
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of SOLVER.REFERENCE_WORLD_SIZE ({reference}), "
            f"got {cfg.SOLVER.IMS_PER_BATCH}"
        )
    return DefaultTrainer.auto_scale_workers(cfg, num_processes)


def _fit_to(max_iter: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Return what changes in a plan whose length the user has set."""
    periods = {name: min(plan[name], max_iter) for name in ("eval_period", "checkpoint_period")}
    return {"max_iter": max_iter, "drop": max_iter * DROP_PERCENT // 100, **periods}


def drops_of(run: RunConfig) -> list[int]:
    """Return the iterations after which the learning rate drops; none in schedules without steps."""
    milestones, max_iter = run.get("milestones"), run.get("max_iter")
    if not milestones:
        return []
    # A LazyConfig's are shares of the last one, whatever train.max_iter is.
    *steps, end = milestones
    drops = [math.ceil(step * max_iter / end) for step in steps]
    return [drop for drop in drops if drop < max_iter]


def _describe_drops(run: RunConfig) -> str:
    drops, max_iter = drops_of(run), run.get("max_iter")
    return "".join(f", dropped after iteration {drop} ({100 * drop / max_iter:.3g} %)" for drop in drops)


def _describe_periods(run: RunConfig) -> str:
    evaluations, checkpoints = run.get("eval_period"), run.get("checkpoint_period")
    if evaluations == checkpoints:
        return f"Evaluation and checkpoint every {evaluations} iterations"
    return f"Evaluation every {evaluations} iterations, checkpoint every {checkpoints}"
