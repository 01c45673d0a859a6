"""A program on the CPU starts anew with threads that wait briefly, where that helps and the user has said nothing."""

import os
import subprocess
import sys

import pytest
import torch

from deformable_detr.startup import processors


@pytest.fixture
def restarts(monkeypatch):
    """Command lines that took this process's place, which has two threads, GNU OpenMP, no GPU and a core for each."""
    found = []
    monkeypatch.setattr(os, "execv", lambda path, command: found.append(command))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "deformable_detr.detect", "a.jpg"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processors, "_has_gnu_openmp", lambda: True)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    return found


def test_a_long_run_starts_anew_with_the_same_command_line(restarts):
    processors.share_processors(long_running=True)
    assert restarts == [[sys.executable, "-X", "dev", "-m", "deformable_detr.detect", "a.jpg"]]
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    processors.share_processors(long_running=True)
    assert len(restarts) == 1


@pytest.mark.parametrize("load, anew", [(0.4, False), (0.6, True), (8.0, True)])
def test_a_short_run_starts_anew_only_on_a_busy_machine(restarts, monkeypatch, load, anew):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    processors.share_processors(long_running=False)
    assert bool(restarts) == anew


@pytest.mark.parametrize("name, value", [("GOMP_SPINCOUNT", "5"), ("OMP_WAIT_POLICY", "active")])
def test_what_the_user_has_set_stays(restarts, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    processors.share_processors(long_running=True)
    assert not restarts and os.environ[name] == value


@pytest.mark.parametrize(
    "target, name, value",
    [
        (torch, "get_num_threads", lambda: 1),
        (torch.cuda, "is_available", lambda: True),
        (sys, "gettrace", lambda: print),
        (processors, "_has_gnu_openmp", lambda: False),
    ],
    ids=["one thread", "a GPU", "a debugger", "another OpenMP"],
)
def test_nothing_starts_anew_where_it_would_not_help(restarts, monkeypatch, target, name, value):
    monkeypatch.setattr(target, name, value)
    processors.share_processors(long_running=True)
    assert not restarts


@pytest.mark.skipif(not processors._has_gnu_openmp() or torch.cuda.is_available(), reason="needs GNU OpenMP, no GPU")
def test_openmp_itself_reads_the_count_and_the_program_runs_once(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\nfrom deformable_detr.startup.processors import share_processors\n"
        "share_processors(long_running=True)\nprint('ran with', *sys.argv[1:])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, str(script), "a b"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "ran with a b\n"
    counts = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert counts[-1] == "10000" and counts[0] != "10000"
