"""A run that is killed at random moments, again and again, is in the end the run that was left alone."""

import json
import os
import random
import signal
import time
from pathlib import Path

import torch

from deformable_detr.engine import argument_parser, main

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
    """The later line of an iteration counts: a resumed run repeats what came after its checkpoint."""
    lines = (output / "metrics.json").read_text().splitlines()
    rows = []
    for line in lines:
        # A kill can leave half of a line.
        if line.startswith("{") and line.endswith("}"):
            rows.append(json.loads(line))
    return {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}


def test_killed_runs_resume_to_the_same_losses(tiny_yaml, write_coco, tmp_path, amount, outcomes):
    arguments = [*write_coco("train").flags("train"), *tiny_yaml()]
    start = time.monotonic()
    run(arguments, tmp_path / "whole")
    whole_run = time.monotonic() - start
    expected = losses_of(tmp_path / "whole")
    assert sorted(expected) == list(range(ITERATIONS))

    rng = random.Random(0)
    kills, output, runs = 0, tmp_path / "killed_0", 1
    while kills < amount(2, 50):
        if run_in_a_child(["--resume", *arguments], output, seconds=rng.uniform(0.1, 1.0) * whole_run):
            outcomes["ended before its kill"] += 1
            assert losses_of(output) == expected
            output, runs = tmp_path / f"killed_{runs}", runs + 1
        else:
            outcomes["killed"] += 1
            kills += 1
    assert run_in_a_child(["--resume", *arguments], output, seconds=600)
    assert losses_of(output) == expected
    whole, last = (torch.load(p / "model_final.pth")["model"] for p in (tmp_path / "whole", output))
    assert all(torch.equal(whole[key], last[key]) for key in whole)
    outcomes["runs resumed to equal losses"] += runs
