"""Training as a user starts it on several processes."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from detectron2.utils import comm

from deformable_detr.startup.launch import TORCHRUN_VARIABLES, launch

TRAIN_NET = Path(__file__).parents[2] / "train_net.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# For two processes on the GPU one would be too few.
ONE_GPU = """
import runpy, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda *_: (8, 0)
torch.cuda.get_device_name = lambda *_: "pretended"
runpy.run_path({train_net!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_process_ends_a_run_of_a_lazy_configuration(tiny_lazy, write_coco, tmp_path):
    """On the CPU, as configured, of a machine that has a GPU."""
    flags = write_coco("train").flags("train") + write_coco("val").flags("val")
    log, metrics = tmp_path / "stderr.txt", tmp_path / "output" / "metrics.json"
    script = tmp_path / "with_one_gpu.py"
    script.write_text(ONE_GPU.format(train_net=str(TRAIN_NET)))
    command = [*TORCHRUN, str(script), *flags, *tiny_lazy(), "train.max_iter=100000", "train.log_period=1"]
    with log.open("w") as stderr, subprocess.Popen(command, env=ENVIRONMENT, stderr=stderr, stdout=stderr) as run:
        try:
            deadline = time.monotonic() + 120
            while not metrics.exists() and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            assert metrics.exists(), log.read_text()[-3000:]
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            assert run.wait(timeout=45) != 0
        finally:
            run.terminate()
    assert "SIGKILL" in log.read_text()


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of the first of two processes, which must not be reached."""
    for name in TORCHRUN_VARIABLES:
        monkeypatch.setenv(name, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.get(name, "0"))


@pytest.mark.parametrize("options", [{"num_gpus": 8}, {"num_machines": 2}])
def test_counting_processes_twice_is_refused(torchrun, options):
    args = argparse.Namespace(**{"num_gpus": 1, "num_machines": 1, **options})
    with pytest.raises(ValueError, match="--nproc-per-node and --nnodes.*--num-gpus"):
        launch(lambda args: None, args)


def test_fewer_gpus_than_processes_are_refused(torchrun, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="2 processes .* need as many GPUs, and it has 1; .* set train.device to"):
        launch(lambda args: None, argparse.Namespace(num_gpus=1, num_machines=1), device_key="train.device")


@pytest.mark.parametrize("options", [{"num_gpus": 8}, {"num_machines": 2}])
def test_gpu_processes_for_a_model_on_the_cpu_are_refused(monkeypatch, options):
    monkeypatch.delenv("RANK", raising=False)
    args = argparse.Namespace(**{"num_gpus": 1, "num_machines": 1, **options})
    with pytest.raises(ValueError, match=r"--num-gpus \(\d\).* but train.device is cpu; .*torchrun"):
        launch(lambda args: None, args, device="cpu", device_key="train.device")


def test_more_processes_than_gpus_are_refused_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    args = argparse.Namespace(num_gpus=2, num_machines=1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="--num-gpus 2 needs as many GPUs that PyTorch can use, and there are 1$"):
        launch(lambda args: None, args)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="there are 0; on the CPU: --num-gpus 0, and MODEL.DEVICE cpu$"):
        launch(lambda args: None, args)


def test_without_torchrun_detectron2_launches(monkeypatch):
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    seen = []
    args = argparse.Namespace(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")
    launch(seen.append, args)
    assert seen == [args]


@pytest.mark.parametrize("has_call", [True, False], ids=["as on its main branch", "as in version 0.6"])
def test_detectron2_is_told_the_processes_of_the_machine(torchrun, monkeypatch, has_call):
    """The groups of two machines with two processes each, seen from the third process."""
    told = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *_, **__: None)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 2)
    monkeypatch.setattr("torch.distributed.new_group", list)
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    if has_call:
        monkeypatch.setattr(comm, "create_local_process_group", told.append, raising=False)
    else:
        monkeypatch.delattr(comm, "create_local_process_group", raising=False)
    launch(lambda args: None, argparse.Namespace(num_gpus=1, num_machines=1), device="cpu")
    assert (told, comm._LOCAL_PROCESS_GROUP) == (([2], None) if has_call else ([], [2, 3]))


@pytest.mark.slow
def test_a_mistake_is_told_once_and_without_a_stack(tiny_yaml):
    command = [*TORCHRUN, str(TRAIN_NET), *tiny_yaml(), "SOLVER.MAX_ITR", "3"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=250)
    assert done.returncode != 0
    assert done.stderr.count("error: the configuration has no key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?") == 1
    assert "error in process" not in done.stderr and "/deformable_detr/" not in done.stderr


SPAWNED = """
import os, sys
import torch.multiprocessing
from deformable_detr import load_config
from deformable_detr.cli import run
from deformable_detr.startup.launch import _tell_mistakes

def read(name):
    load_config(name)

def work(rank, name):
    os.environ["RANK"] = str(rank)
    _tell_mistakes(read, name)

def main(argv):
    torch.multiprocessing.spawn(work, args=("nowhere.yaml",), nprocs=2)

if __name__ == "__main__":
    sys.exit(run(main))
"""


@pytest.mark.slow
def test_a_mistake_in_the_processes_of_detectron2s_launcher_is_told_once(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    done = subprocess.run([sys.executable, str(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no configuration file 'nowhere.yaml'\n")
    assert done.stderr.count("error") == 1 and "Traceback" not in done.stderr
