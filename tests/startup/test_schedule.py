"""A schedule from epochs, images and GPUs, given to configurations of every form."""

import copy
import logging
from pathlib import Path

import pytest
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

from deformable_detr import load_config
from deformable_detr.config import RunConfig
from deformable_detr.solver import build_lr_multiplier
from deformable_detr.startup.schedule import apply_schedule, plan_schedule

CONFIG = Path(__file__).parents[2] / "configs" / "COCO-Detection" / "deformable_detr_R_50"


def test_official_schedule_follows_from_its_epochs_and_batch():
    plan = plan_schedule(num_images=118_287, epochs=50, batch=32, reference_lr=2e-4, reference_batch=32)
    # 3,697 iterations see every image at least once; the official code drops the incomplete last batch.
    assert plan["max_iter"] == 50 * 3697 and plan["drop"] == 40 * 3697 and plan["lr"] == 2e-4


@pytest.mark.parametrize("name", ("epochs", "num_images", "batch"))
def test_schedules_of_nothing_are_refused(name):
    values = {"num_images": 10, "epochs": 2, "batch": 2, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        plan_schedule(**values, reference_lr=1e-4, reference_batch=2)


def test_schedules_without_steps_get_their_length_alone(caplog):
    caplog.set_level(logging.INFO)
    target = "fvcore.common.param_scheduler.CosineParamScheduler"
    lazy = load_config(f"{CONFIG}.py")
    lazy.lr_multiplier.scheduler = {"_target_": target, "start_value": 1.0, "end_value": 0.0}
    yaml = load_config(f"{CONFIG}.yaml", ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"])
    for cfg in (lazy, yaml):
        reference = RunConfig(copy.deepcopy(cfg))
        apply_schedule(RunConfig(cfg), reference=reference, epochs=3, num_images=4, num_gpus=1)
    assert lazy.train.max_iter == yaml.SOLVER.MAX_ITER == 6
    assert "milestones" not in lazy.lr_multiplier.scheduler and yaml.SOLVER.STEPS == (147840,)
    assert "dropped" not in caplog.text


@pytest.mark.parametrize("end", ({"milestones": [60, 80, 90]}, {"milestones": [60, 80], "num_updates": 90}))
def test_two_drops_become_one_in_a_new_schedule(end):
    """The forms of Detectron2's own LazyConfigs, and SOLVER.STEPS of two iterations."""
    lazy, yaml = load_config(f"{CONFIG}.py"), load_config(f"{CONFIG}.yaml", ["SOLVER.STEPS", "(60, 80)"])
    lazy.lr_multiplier.scheduler = L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], **end)
    for cfg in (lazy, yaml):
        apply_schedule(RunConfig(cfg), reference=RunConfig(copy.deepcopy(cfg)), epochs=5, num_images=4, num_gpus=1)
    # 5 epochs of 2 batches, 80 % of which are 8.
    assert yaml.SOLVER.STEPS == (8,) and yaml.SOLVER.MAX_ITER == lazy.train.max_iter == 10
    factors = [build_lr_multiplier(lazy.lr_multiplier)(iteration / 10) for iteration in range(10)]
    assert factors == [1.0] * 8 + [0.1] * 2


def test_a_schedule_for_data_needs_a_batch_and_a_learning_rate_to_start_from():
    cfg = load_config(f"{CONFIG}.py")
    del cfg.optimizer["lr"]
    with pytest.raises(ValueError, match=r"^a schedule for so many epochs needs optimizer\.lr.* has none$"):
        apply_schedule(RunConfig(cfg), reference=RunConfig(cfg), epochs=5, num_images=4, num_gpus=1)
