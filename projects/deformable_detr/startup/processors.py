"""How the threads of a program on the CPU wait for each other on a machine that has other work too."""

import os
import sys
from pathlib import Path

import torch

from ..wording import counted

# A tenth of a millisecond or so. GNU OpenMP's own 300,000 are some milliseconds: longer than a busy machine lets a
# thread run, so that threads use up their turns waiting for one that has none. With 3,000 and fewer, threads fall
# asleep between the operations of a small model and have to be woken for each.
SPIN_COUNT = 10_000
_SET_BY_USERS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def share_processors(*, long_running: bool) -> None:
    """Start this program anew if its threads had better wait less eagerly; to be called first in a process's own main.

    GNU OpenMP, which PyTorch brings along on Linux, reads how long a thread spins before it sleeps when PyTorch is
    imported. So the variable is set, and the same command line takes the place of this process. Nothing happens for
    programs with a GPU or with one thread, under a debugger, and where the user has set such a variable.

    Args:
        long_running: other work may begin later. Otherwise a machine that has a core for each thread now is enough.
    """
    if not _would_help(long_running):
        return
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def available_cores() -> int:
    """Return how many cores this process may use."""
    # Not every system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_load() -> str | None:
    """Return one line about a machine that other programs keep busy, and what helps; None where there is room.

    To be called when a program begins: later it is a part of the load itself.
    """
    if not hasattr(os, "getloadavg") or torch.cuda.is_available():
        return None
    # The load is that of the whole machine, also where this process may use a part of it.
    load, cores, threads = os.getloadavg()[0], os.cpu_count() or 1, torch.get_num_threads()
    if load + threads <= cores + 0.5:
        return None
    told = (
        f"This machine is busy: {load:.1f} processes wanted its {cores} cores in the last minute, and this one has "
        f"{counted(threads, 'thread')}. It will take longer"
    )
    return told if threads == 1 else f"{told}; OMP_NUM_THREADS=1 in front of the command helps, or wait for the others"


def _would_help(long_running: bool) -> bool:
    threads = torch.get_num_threads()
    if threads == 1 or any(name in os.environ for name in _SET_BY_USERS) or sys.gettrace() is not None:
        return False
    if not _has_gnu_openmp() or torch.cuda.is_available():
        return False
    return long_running or os.getloadavg()[0] + threads > len(os.sched_getaffinity(0)) + 0.5


def _has_gnu_openmp() -> bool:
    libraries = Path("/proc/self/maps")
    return libraries.is_file() and "libgomp" in libraries.read_text()
