"""What tools/gpu_check.sh does when stages fail, run with a Python that only pretends to have a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.sh"
# Records results for real, and leaves traces of what else it is asked for. Tests and training wait for each other.
PYTHON = f"""#!/bin/sh
meet() {{ touch "$TRACES/$1"; for i in $(seq 300); do [ -e "$TRACES/$2" ] && return; sleep 0.1; done; exit 9; }}
case "$*" in
    "- "*)
        exec {sys.executable} "$@" ;;
    *"pip install"*)
        echo install >> "$TRACES/log"; mkdir -p "$WORK/site" ;;
    *build_ext*)
        echo build >> "$TRACES/log"; sleep "${{BUILD_SECONDS:-0}}"; [ -z "$BUILD_FAILS" ] || {{ echo no; exit 3; }} ;;
    *"-m pytest"*)
        meet tests training ;;
    *train_net.py*)
        meet training tests
        for kind in float32 bfloat16 float16; do
            mkdir -p "$WORK/amp_$kind"; echo '{{"AP": 1}}' > "$WORK/$$"; mv "$WORK/$$" "$WORK/amp_$kind/metrics.json"
        done ;;
    *deformable_detr.benchmark*)
        echo "$*"; for last; do :; done; echo '{{"results": [7]}}' > "$last"; exit "${{MEASURED:-0}}" ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    """A function (commands) -> the finished process and results.json's stages; run in a tree with nothing else."""
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("needs bash and coreutils")
    for name in ("tree/tools", "tree/projects/deformable_detr", "tree/tests/layers", "traces", "wheels"):
        (tmp_path / name).mkdir(parents=True)
    script = shutil.copy(SCRIPT, tmp_path / "tree" / "tools")
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*commands, **variables):
        defaults = {"DEVICE": "cpu", "PYTHON": str(python), "WORK": str(tmp_path / "work"), "BUILD_FAILS": ""}
        ignored = {"WHEELS", "OPERATOR", "BUDGET", "QUICK"}
        environment = {key: value for key, value in os.environ.items() if key not in ignored}
        environment |= {"TRACES": str(tmp_path / "traces"), **defaults, **variables}
        command = ["bash", script, str(tmp_path / "out"), *commands]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        path = tmp_path / "out" / "results.json"
        return done, json.loads(path.read_text())["stages"] if path.exists() else {}

    return run


def test_a_failing_stage_is_shown_and_does_not_stop_the_next(check):
    done, stages = check("op", BUILD_FAILS="1")
    assert done.returncode == 1 and "build: failed with status 3" in done.stdout and "\nno\n" in done.stdout
    results = {name: stage["result"] for name, stage in stages.items()}
    assert results == {"install": "skipped", "build": "failed with status 3", "op": "passed"}
    assert stages["build"]["text"] == ["no"]


def test_results_have_the_numbers_of_every_benchmark_also_of_one_that_failed(check):
    done, stages = check("model", QUICK="1", MEASURED="4")
    assert done.returncode == 1 and stages["infer"]["result"] == "failed with status 1"
    assert stages["train"]["numbers"] == {name: {"results": [7]} for name in ("train", "checkpoint")}
    assert "--sizes 64x96" in stages["train"]["text"][0]


def test_a_stage_ends_within_the_budget(check):
    done, stages = check("op", BUILD_SECONDS="60", BUDGET="3")
    assert done.returncode == 1 and stages["build"]["result"].startswith("ended after ")
    assert stages["build"]["seconds"] < 30 and "op" in stages


def test_nothing_is_installed_or_built_twice(check, tmp_path):
    operator = tmp_path / "_C.abi3.so"
    operator.write_text("built before")
    for _ in range(2):
        done, _ = check("op", WHEELS=str(tmp_path / "wheels"), OPERATOR=str(operator))
        assert done.returncode == 0, done.stdout
    assert (tmp_path / "traces" / "log").read_text() == "install\n"
    copy = tmp_path / "tree" / "projects" / "deformable_detr" / operator.name
    assert copy.read_text() == "built before"


def test_tests_and_training_run_side_by_side(check):
    done, stages = check("check")
    assert done.returncode == 0, done.stdout
    assert stages["tests"]["result"] == stages["amp"]["result"] == "passed"
    assert stages["amp"]["text"].count('{"AP": 1}') == 3


def test_unknown_command_is_named_before_anything_runs(check, tmp_path):
    done, stages = check("op", "benchmarks")
    assert done.returncode == 2 and "unknown command benchmarks; there are: check op model" in done.stderr
    assert not stages and not (tmp_path / "out").exists()


def test_the_three_commands_end_within_twelve_minutes():
    text = SCRIPT.read_text()
    limits = {stage: int(seconds) for stage, seconds in re.findall(r"\[(\w+)\]=(\d+)", text)}
    said = re.findall(r"^#(?:   \w+)? +(\w+) +(\d+)  ", text, re.MULTILINE)
    assert {stage: int(seconds) for stage, seconds in said} == limits
    steps = re.search(r'commands=\(\[check\]="(.*)" \[op\]="(.*)" \[model\]="(.*)"\)', text)
    commands = [sum(max(limits[s] for s in step.split("+")) for step in group.split()) for group in steps.groups()]
    first = max(limits["install"], limits["build"])
    assert first + sum(commands) <= 12 * 60
    # Each command, starting afresh, ends within ten minutes.
    assert all(first + command <= 570 for command in commands)
