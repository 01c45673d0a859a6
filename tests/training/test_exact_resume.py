"""A run that is killed and resumed is, bit for bit, the run that was never interrupted."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn

from deformable_detr.training.loop import TrainingLoop
from deformable_detr.training.settings import TrainingSettings

from .conftest import Runner, differences, losses_of, read_checkpoint


def kill_in_a_child(work: Callable[[], object], *, when: Callable[[], bool] = lambda: False) -> None:
    """Run work in a process of its own that is ended by kill -9, once a condition holds or by its own doing."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        if when() or time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)
            break
        time.sleep(0.01)
    assert os.WIFSIGNALED(status[1]) and os.WTERMSIG(status[1]) == signal.SIGKILL


def has_lines(path: Path, count: int) -> bool:
    return path.is_file() and path.read_bytes().count(b"\n") >= count


def assert_same_run(one: Path, other: Path) -> None:
    assert losses_of(one) == losses_of(other)
    assert differences(read_checkpoint(one), read_checkpoint(other)) == []


def test_run_killed_anywhere_resumes_bitwise(run, tmp_path):
    """With everything that has a state: in one system loading processes, in the other loss scaling.

    Up to its end the killed run is also another run of the same seed.
    """
    if run.is_lazy:
        special = {"amp": True, "precision": "float16", "accumulation": 2}
    else:
        special = {"workers": 2, "eval_period": 3}
    options = {"max_iter": 5, "checkpoint_period": 2, "ema": True, **special}
    run(tmp_path / "whole", **options)
    assert sorted(losses_of(tmp_path / "whole"))[:5] == [0, 1, 2, 3, 4]

    killed = tmp_path / "killed"
    kill_in_a_child(lambda: run(killed, **options), when=lambda: has_lines(killed / "metrics.json", 3))
    assert not (killed / "model_final.pth").exists()
    run(killed, "--resume", **options)
    assert_same_run(killed, tmp_path / "whole")


def test_run_killed_while_it_writes_a_checkpoint_resumes_bitwise(run_yaml, tmp_path, monkeypatch, caplog):
    options = {"max_iter": 4, "checkpoint_period": 1}
    run_yaml(tmp_path / "whole", **options)
    killed = tmp_path / "killed"

    def save_and_die(content, stream):
        if content["iteration"] == 2:
            stream.write(b"half of a checkpoint")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, stream)

    save = torch.save
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", save_and_die)
        kill_in_a_child(lambda: run_yaml(killed, **options))
    assert (killed / "last_checkpoint").read_text() == "model_0000001.pth"
    # As if the disk had lost a part of the newest checkpoint, too.
    os.truncate(killed / "model_0000001.pth", 5000)
    # What was best is newer than what is left, and not what is gone on from.
    shutil.copy(tmp_path / "whole" / "model_0000002.pth", killed / "model_best.pth")
    caplog.set_level(logging.WARNING)
    run_yaml(killed, "--resume", **options)
    assert_same_run(killed, tmp_path / "whole")
    assert "model_0000000.pth, as newer checkpoints cannot be read" in (killed / "log.txt").read_text()
    assert "model_0000001.pth is truncated" in (killed / "log.txt").read_text()


def test_run_without_a_seed_goes_on_as_it_would_have(run_yaml, tmp_path, monkeypatch):
    """Also where batch statistics are computed anew, of the trained and of the averaged weights, and with denoising."""
    monkeypatch.setattr("deformable_detr.engine.Trainer.test", lambda *_: {})
    arguments = run_yaml.arguments
    statistics = ["MODEL.RESNETS.NORM", "BN", "TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"]
    queries = ["MODEL.DEFORMABLE_DETR.DN_NUMBER", "3", "MODEL.DEFORMABLE_DETR.NUM_ONE2MANY_QUERIES", "10"]
    run_yaml.arguments = lambda: [*arguments("_two_stage"), *statistics, *queries]
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = {"seed": -1, "max_iter": 2, "checkpoint_period": 1, "eval_period": 1, "ema": True}
    run_yaml(whole, **options)
    shutil.copytree(whole, again)
    (again / "last_checkpoint").write_text("model_0000000.pth")
    run_yaml(again, "--resume", **options)
    assert_same_run(again, whole)
    assert {"loss_ce_dn", "loss_giou_dn_0", "loss_bbox_one2many", "loss_ce_one2many_0"} <= losses_of(whole)[1].keys()
    norm = "backbone.bottom_up.res5.0.conv1.norm."
    # The first average is a copy, of which the statistics are computed from the same batches.
    first = read_checkpoint(whole, "model_0000000")
    assert len(first["ema"]["model"]["denoising.label_enc.weight"]) == 3
    assert torch.equal(first["ema"]["model"][norm + "running_var"], first["model"][norm + "running_var"])
    assert read_checkpoint(whole)["model"][norm + "num_batches_tracked"] == 2 + 2 * 2


def test_run_killed_right_before_its_last_file_gets_it_when_resumed(run, tmp_path):
    run(tmp_path / "run", max_iter=4, checkpoint_period=2)
    whole = read_checkpoint(tmp_path / "run")
    if run.is_lazy:
        # Of an earlier run in the folder, from which this one began.
        (tmp_path / "run" / "model_final.pth").write_bytes(b"older")
        os.utime(tmp_path / "run" / "model_final.pth", (0, 0))
    else:
        (tmp_path / "run" / "model_final.pth").unlink()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000003.pth")
    run(tmp_path / "run", "--resume", max_iter=4, checkpoint_period=2)
    assert differences(read_checkpoint(tmp_path / "run"), whole) == []
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"
    # But what was to be shorter, such as by the number of GPUs, is no end.
    with pytest.raises(
        ValueError, match=r"(MAX_ITER|max_iter) is 3, but the last .* has done 4 iterations: set it to 4 "
    ):
        run(tmp_path / "run", "--resume", max_iter=3, checkpoint_period=2)


@pytest.mark.parametrize("scheduled", [True, False], ids=["yaml", "lazy"])
def test_a_learning_rate_that_was_changed_before_a_resume_is_told_of(tmp_path, caplog, scheduled):
    def build(lr: float, *, scheduled: bool) -> TrainingLoop:
        model = nn.Linear(1, 1)
        groups = [{"params": [model.weight], "lr": lr}, {"params": [model.bias], "lr": lr / 10}]
        optimizer = torch.optim.SGD(groups, lr=lr)
        if scheduled:
            LRMultiplier(optimizer, MultiStepParamScheduler([1.0, 0.1], milestones=[1, 2]), max_iter=2)
        return TrainingLoop(model, [], optimizer, TrainingSettings(output_dir=str(tmp_path), seed=1))

    stopped = build(2e-4, scheduled=True)
    # Behind the drop: what counts is the rate before it.
    stopped.optimizer.param_groups[0]["lr"] = 2e-5
    stopped.iter = 1
    build(2e-4, scheduled=scheduled).load_state_dict(stopped.state_dict())
    assert not caplog.records
    # A LazyConfig's schedule is built behind the checkpoint.
    build(5e-5, scheduled=scheduled).load_state_dict(stopped.state_dict())
    assert "goes on with the learning rate 0.0002 of its checkpoint, not 5e-05" in caplog.text
    assert "with MODEL.WEIGHTS set to that file" in caplog.text


def test_a_detr_resumes_bitwise_and_is_evaluated_layer_by_layer(tiny_lazy, data, tmp_path):
    run = Runner(lambda: tiny_lazy("detr_R_50"), is_lazy=True, flags=data)
    options = {"checkpoint_period": 2, "accumulation": 2, "per_layer_ap": True}
    run(tmp_path / "whole", max_iter=3, eval_period=3, **options)
    run(tmp_path / "parts", max_iter=2, **options)
    run(tmp_path / "parts", "--resume", max_iter=3, **options)
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert {"loss_ce", "loss_bbox_0", "class_error", "cardinality_error"} <= whole[2].keys()
    assert [whole[step]["total_loss"] for step in range(3)] == [parts[step]["total_loss"] for step in range(3)]
    assert differences(read_checkpoint(tmp_path / "whole")["model"], read_checkpoint(tmp_path / "parts")["model"]) == []
    evaluated = {name for row in whole.values() for name in row}
    assert {"bbox/AP", "bbox_layer_0/AP", "bbox_layer_1/AP"} <= evaluated
