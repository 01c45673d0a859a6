"""Several gloo processes on one machine; ``worker.py`` runs them all once, the tests read what they report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIANTS = ("_single_scale", "_single_scale_dc5", "", "_box_refine", "_two_stage")
# A narrow ResNet-50: the dilated variant needs bottleneck blocks.
NARROW = [
    "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.DEFORMABLE_DETR.DROPOUT", "0.0",
]  # fmt: skip
OPTIONS = [
    "further queries", "no objects anywhere", "activation checkpoints", "no auxiliary losses", "recorded steps",
    "accumulation",
]  # fmt: skip
STEPS = [f"variant {variant or 'base'}" for variant in VARIANTS] + OPTIONS
RANKS = [(size, rank) for size in (2, 3) for rank in range(size)]
REPORTS = {}
MODELING = Path(__file__).parents[1] / "modeling"  # Its tests' imitated graphs serve here as well.


@pytest.fixture
def reports(tiny_yaml, write_coco, tmp_path) -> dict[tuple[int, int], dict]:
    """What each process (size, rank) found; computed for the first test that asks."""
    if not REPORTS:
        data = write_coco()
        configs = {variant: [*tiny_yaml(variant), *NARROW] for variant in VARIANTS}
        task = tmp_path / "task.json"
        flags = data.flags("train") + data.flags("val")
        content = {"configs": configs, "json": data.json, "images": data.images, "flags": flags}
        task.write_text(json.dumps({**content, "output": str(tmp_path)}))
        # No GPU: a process that has used one cannot be forked.
        path = os.pathsep.join([str(MODELING), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(task)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
        for size, rank in RANKS:
            path = tmp_path / f"{size}-{rank}.json"
            REPORTS[size, rank] = json.loads(path.read_text()) if path.exists() else {"log": done.stderr}
    return REPORTS


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_two_training_steps_equal_those_of_one_process_on_the_global_batch(reports, size, rank, name):
    report = reports[size, rank]
    assert isinstance(report.get(name), float), report
    # Sums over images are taken in another order; measured: 1e-5.
    assert report[name] < 1e-4


@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_a_process_without_objects_trains_with_those_that_denoise(reports, size, rank):
    assert reports[size, rank]["nothing to denoise"] is True


@pytest.mark.parametrize("name", ["evaluation", "evaluation of layers"])
@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_gathered_evaluation_equals_that_of_one_process(reports, size, rank, name):
    assert reports[size, rank][name] == 0


@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_the_number_of_objects_is_averaged_over_processes(reports, size, rank):
    mean = {2: (0.5 + 1.5) / 2, 3: (0.5 + 1.5 + 2.5) / 3}[size]
    assert reports[size, rank]["normaliser"] == pytest.approx(max(1, mean), rel=1e-5)


@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_a_model_with_unused_parameters_is_refused_or_trains_with_the_key(reports, size, rank):
    assert reports[size, rank]["unused"] == 2


@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_parts_fit_into_the_memory_of_every_process(reports, size, rank):
    assert reports[size, rank]["parts"] == 2


@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_a_yaml_configuration_trains_and_evaluates(reports, size, rank):
    assert 0 <= reports[size, rank]["run"] <= 100


@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_processes_of_a_machine_know_each_other(reports, size, rank):
    assert reports[size, rank]["local size"] == size


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (3, 0), (3, 1)])
def test_processes_stop_with_an_error_soon_after_one_was_killed(reports, size, rank):
    assert reports[size, rank]["killed"] < 20
    assert "killed" not in reports[size, size - 1]
