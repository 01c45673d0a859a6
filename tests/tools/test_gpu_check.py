"""What tools/gpu_check.sh does when stages fail, run with a Python that only pretends: GPUs are lent by the minute."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.sh"
# A compiler that fails, training that leaves no metrics behind, and what records the results for real.
PYTHON = f"""#!/bin/sh
case "$*" in
    "- "*) exec {sys.executable} "$@" ;;
    *build_ext*) sleep "$BUILD_SECONDS"; echo the compiler says no; exit 3 ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    """A function (stages) -> the finished process and results.json's stages."""
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("needs bash and coreutils")
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*stages, **variables):
        variables = {"DEVICE": "cpu", "PYTHON": str(python), "WORK": str(tmp_path / "work"), **variables}
        environment = {key: value for key, value in os.environ.items() if key != "WHEELS"}
        command = ["bash", str(SCRIPT), str(tmp_path / "out"), *stages]
        done = subprocess.run(
            command, env={**environment, "BUILD_SECONDS": "0", **variables}, capture_output=True, text=True
        )
        path = tmp_path / "out" / "results.json"
        return done, json.loads(path.read_text())["stages"] if path.exists() else {}

    return run


def test_a_failing_stage_is_shown_and_does_not_stop_the_next(check, tmp_path):
    done, stages = check("build", "install", "amp")
    assert done.returncode == 1 and "the compiler says no" in done.stdout
    assert {name: stage["result"] for name, stage in stages.items()} == {
        "build": "failed with status 3",
        "install": "skipped",
        "amp": "failed with status 1",
    }
    assert (tmp_path / "out" / "build.txt").read_text() == "the compiler says no\n"


def test_a_stage_ends_in_time_for_those_after_it(check):
    done, stages = check("build", "install", BUILD_SECONDS="60", BUDGET="2")
    assert done.returncode == 1 and stages["install"]["result"] == "skipped"
    assert stages["build"]["result"].startswith("ended after ") and stages["build"]["seconds"] < 30


def test_unknown_stage_is_named_before_anything_runs(check, tmp_path):
    done, stages = check("build", "benchmarks")
    assert done.returncode == 2 and "unknown stage benchmarks; there are: install build" in done.stderr
    assert not stages and not (tmp_path / "out").exists()


def test_stages_recommended_together_end_within_ten_minutes():
    text = SCRIPT.read_text()
    limits = {stage: int(seconds) for stage, seconds in re.findall(r"\[(\w+)\]=(\d+)", text)}
    assert {stage: int(seconds) for stage, seconds in re.findall(r"^#   (\w+) +(\d+)  ", text, re.MULTILINE)} == limits
    groups = re.findall(r"gpu_check.sh OUT (install .*)", text)
    assert len(groups) == 3
    assert all(sum(limits[stage] for stage in group.split()) <= 570 for group in groups)
