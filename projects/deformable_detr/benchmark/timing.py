"""What the benchmarks share: timing in turns, peak memory, description of the machine, the table."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path

import torch
from tabulate import tabulate

from ..cli import check_device
from ..files import check_writable, write_json
from ..layers import _ops
from ..wording import counted

Call = Callable[[], object]

# Processor time, with one thread, does not count what else a busy machine does meanwhile.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
# What PyTorch's profiler says of itself; 35 is CUDA's code for a machine without its driver.
_PROFILERS_OWN = (b"] profiler_start", b"] profiler_stop", b"gpuGetDeviceCount failed with code 35")


def on_device(device: str) -> contextlib.AbstractContextManager:
    """Make a GPU the current one, which streams, events and recordings of graphs belong to."""
    return torch.cuda.device(device) if device.startswith("cuda") else contextlib.nullcontext()


def time_call(call: Call, device: str, *, count: int = 1) -> float:
    """Milliseconds of one of ``count`` calls in a row; on CUDA by events in the stream of :func:`on_device`."""
    if not device.startswith("cuda"):
        return time_on_host(call, device, count=count)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def time_on_host(call: Call, device: str, *, clock: str = "wall", count: int = 1) -> float:
    """Milliseconds of one of ``count`` calls in a row by the host's clock, until the device has finished them."""
    read = CLOCKS[clock]
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = read()
    for _ in range(count):
        call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return 1e3 * (read() - start) / count


def time_in_turns(
    calls: Mapping[Hashable, Call],
    *,
    rounds: int,
    device: str,
    warmup: int = 0,
    clock: str = "wall",
) -> dict[Hashable, list[float]]:
    """Milliseconds of every call in every round, with what the host does for it.

    In turns, so that a busy machine slows all of them alike.

    Args:
        warmup: untimed calls of each before the rounds.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[Hashable, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(time_on_host(call, device, clock=clock))
    return times


def time_cold_and_settled(
    calls: Mapping[Hashable, Call], *, rounds: int, device: str, settle_ms: float
) -> tuple[dict[Hashable, list[float]], dict[Hashable, list[float]]]:
    """As :func:`time_in_turns`, of the first call in each turn and of those that follow.

    The first call finds the caches as another implementation left them. It is repeated for ``settle_ms`` in all; then
    as many calls as that took are timed together.
    """
    cold: dict[Hashable, list[float]] = {key: [] for key in calls}
    settled: dict[Hashable, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            cold[key].append(time_call(call, device))
            spent, count = cold[key][-1], 1
            while spent < settle_ms:
                spent += time_call(call, device)
                count += 1
            settled[key].append(time_call(call, device, count=count))
    return cold, settled


def summarise(samples: list[float], reference: list[float]) -> dict[str, float]:
    """Median, quartile range / median, and the median over rounds of time / the reference's time."""
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
    ratio = statistics.median(a / b for a, b in zip(samples, reference, strict=True))
    return {"ms": median, "spread": (high - low) / median, "ratio": ratio}


def peak_memory(call: Call, device: str) -> float:
    """MiB that a call allocates at its peak, on top of what exists before (weights, inputs).

    On CUDA from the caching allocator. On the CPU from the profiler's record of the tensor allocator, which repeats
    to the byte; the resident size of the process depends on what malloc happens to keep. Scratch memory that oneDNN
    and MKL take by themselves is not in it.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _without_the_profilers_own_lines(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak / 2**20


@contextlib.contextmanager
def _without_the_profilers_own_lines() -> Iterator[None]:
    """Drop from standard error that the profiler begins, ends, and finds no GPU to profile; pass on all else.

    It writes in C++, past Python's streams.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as told:
        os.dup2(told.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            told.seek(0)
            os.write(2, b"".join(line for line in told if not any(words in line for words in _PROFILERS_OWN)))


def describe_machine(devices: list[str], threads: int) -> str:
    """Processors, torch, threads, and which implementation of the op runs."""
    kernels = ", ".join(f"{device}: {'kernel' if _ops.has_kernel(device) else 'twin'}" for device in devices)
    names = [torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name() for device in devices]
    return f"{', '.join(names)}; torch {torch.__version__}; {counted(threads, 'thread')}; {kernels}"


@contextlib.contextmanager
def printing_and_saving(args: argparse.Namespace, notes: str) -> Iterator[list[dict]]:
    """Give a list of rows to fill; at the end print it as a table, and write it with the machine to ``--json``.

    An error, such as of memory at the last batch size, leaves the rows before it.

    Raises:
        ValueError, OSError: before anything is measured, if a device is not there or the file cannot be written.
    """
    for device in args.devices:
        check_device(device)
    if args.json:
        check_writable(args.json)
    rows: list[dict] = []
    try:
        yield rows
    finally:
        if rows:
            machine = describe_machine(args.devices, args.threads)
            print(machine, tabulate(rows, headers="keys", floatfmt=".4g"), notes, sep="\n")
            if args.json:
                write_json(args.json, {"machine": machine, "results": rows}, indent=1)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
