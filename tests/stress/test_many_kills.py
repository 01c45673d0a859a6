"""A run that is killed at random moments, again and again, is in the end the run that was left alone."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch

from deformable_detr.engine import argument_parser, main
from deformable_detr.training.metrics import read_metrics

ITERATIONS = 10


def run(arguments: list[str], output: Path) -> None:
    opts = ["OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", str(ITERATIONS), "SOLVER.LOG_PERIOD", "1"]
    main(argument_parser().parse_args([*arguments, *opts, "SOLVER.CHECKPOINT_PERIOD", "1"]))


def run_in_a_child(arguments: list[str], output: Path, *, seconds: float) -> bool:
    """Whether the run ended before it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(arguments, output)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, f"the run failed: {status}"
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def losses_of(output: Path) -> dict[int, float]:
    return {iteration: row["total_loss"] for iteration, row in read_metrics(output).items() if "total_loss" in row}


def assert_same_run(output: Path, whole: Path) -> None:
    """Every loss, and the final weights, are those of the whole run, bit for bit."""
    assert losses_of(output) == losses_of(whole)
    one, other = (torch.load(path / "model_final.pth")["model"] for path in (output, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_killed_runs_resume_to_the_same_losses(tiny_yaml, write_coco, tmp_path, amount, outcomes):
    arguments = [*write_coco("train").flags("train"), *tiny_yaml()]
    start = time.monotonic()
    run(arguments, tmp_path / "whole")
    whole_run = time.monotonic() - start
    expected = losses_of(tmp_path / "whole")
    assert sorted(expected) == list(range(ITERATIONS))

    rng = random.Random(0)
    kills, kills_of_run, runs = 0, 0, 0
    while kills < amount(2, 50) or kills_of_run:
        output = tmp_path / f"killed_{runs}"
        # The last run is left to end.
        seconds = rng.uniform(0.1, 1.0) * whole_run if kills < amount(2, 50) else 600
        if run_in_a_child(["--resume", *arguments], output, seconds=seconds):
            assert_same_run(output, tmp_path / "whole")
            # Ten checkpoints of 130 MB each.
            shutil.rmtree(output)
            outcomes["runs equal to the end"] += 1
            kills_of_run, runs = 0, runs + 1
        else:
            outcomes["kills"] += 1
            kills, kills_of_run = kills + 1, kills_of_run + 1
