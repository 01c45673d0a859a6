"""Time of ms_deform_attn beside its PyTorch twin and other installed implementations, and its share of the bound."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from ..layers import _ops, ms_deform_attn, ms_deform_attn_pytorch
from .shapes import SHAPES, Inputs, make_inputs

Attend = Callable[[Inputs, Tensor, Tensor, Tensor], Tensor]
OURS, TWIN = "deformable_detr", "twin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line of this benchmark."""
    parser.add_argument("--shapes", nargs="+", default=["r50_encoder", "r50_decoder"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of value")
    parser.add_argument("--devices", nargs="+", default=["cuda" if torch.cuda.is_available() else "cpu"])
    parser.add_argument("--distributions", nargs="+", default=["grid"], choices=["grid", "uniform"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5, help="repetitions; every implementation runs in each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure every combination, print a table and write the JSON file."""
    torch.set_num_threads(args.threads)
    rows = []
    for device in args.devices:
        bandwidth = measure_bandwidth(device)
        peers = find_peers(device)
        for combination in itertools.product(args.shapes, args.batches, args.dtypes, args.distributions):
            rows += measure(*combination, device=device, rounds=args.rounds, bandwidth=bandwidth, peers=peers)
    print(describe_machine(args))
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    print("ms: median of the rounds; spread: quartile range / median; ratio: median over rounds of time / our time;")
    print("bound: every tensor read or written once at the measured copy speed of memory; share: bound / ms;")
    print("GB/s: corner rows read, and in the backward pass added to, per second, which caches serve.")
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(args), "results": rows}, indent=1))


def describe_machine(args: argparse.Namespace) -> str:
    kernels = ", ".join(f"{device}: {'kernel' if _ops.has_kernel(device) else 'twin'}" for device in args.devices)
    names = [torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name() for device in args.devices]
    return f"{', '.join(names)}; torch {torch.__version__}; {args.threads} threads; {kernels}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def measure(
    name: str,
    batch: int,
    dtype: str,
    distribution: str,
    *,
    device: str,
    rounds: int,
    bandwidth: float,
    peers: dict[str, Attend],
) -> list[dict]:
    """Rows of the table for one input: forward and forward + backward of every implementation, in turns."""
    inputs = make_inputs(
        SHAPES[name], batch=batch, dtype=getattr(torch, dtype), device=device, distribution=distribution
    )
    rows = []
    for backward in (False, True):
        times = {peer: [] for peer in peers}
        calls = {peer: _make_call(attend, inputs, backward) for peer, attend in peers.items()}
        # In turns, so that a busy machine slows all of them; after an untimed call, which finds the caches as
        # another implementation left them.
        for _, peer in itertools.product(range(rounds), peers):
            calls[peer]()
            times[peer].append(time_call(calls[peer], device))
        passes = (False, True) if backward else (False,)
        bound = 1e3 * sum(inputs.bytes_once(backward=b) for b in passes) / bandwidth
        gathered = sum(inputs.bytes_gathered(backward=b) for b in passes)
        for peer, samples in times.items():
            median = statistics.median(samples)
            low, _, high = statistics.quantiles(samples, n=4) if rounds > 1 else (median,) * 3
            rows.append(
                {
                    "shape": name,
                    "N": batch,
                    "dtype": dtype,
                    "where": f"{device} {distribution}",
                    "pass": "fwd+bwd" if backward else "fwd",
                    "implementation": peer,
                    "ms": median,
                    "spread": (high - low) / median,
                    "ratio": statistics.median(a / b for a, b in zip(samples, times[OURS], strict=True)),
                    "bound ms": bound,
                    "share": bound / median,
                    "GB/s": gathered / median / 1e6,
                }
            )
    return rows


def _make_call(attend: Attend, inputs: Inputs, backward: bool) -> Callable[[], None]:
    tensors = (inputs.value, inputs.sampling_locations, inputs.attention_weights)
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                attend(inputs, *tensors)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def forward_and_backward() -> None:
        torch.autograd.grad(attend(inputs, *leaves), leaves, inputs.grad_output)

    return forward_and_backward


def time_call(call: Callable[[], None], device: str) -> float:
    """Milliseconds of one call."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy within main memory."""
    source = torch.ones((1 << 30 if device.startswith("cuda") else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    milliseconds = min(time_call(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.nbytes / milliseconds * 1e3


def find_peers(device: str) -> dict[str, Attend]:
    """Ours, the twin, and what else is installed and runs on this device."""
    peers: dict[str, Attend] = {
        OURS: lambda inputs, value, locations, weights: ms_deform_attn(
            value, inputs.spatial_shapes, locations, weights
        ),
        TWIN: lambda inputs, value, locations, weights: ms_deform_attn_pytorch(
            value, inputs.spatial_shapes, locations, weights
        ),
    }
    if importlib.util.find_spec("transformers") is not None:
        peers["transformers"] = _transformers()
    if device.startswith("cuda") and importlib.util.find_spec("mmcv") is not None:
        peers["mmcv"] = _mmcv()
    return peers


def _official_shapes(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """spatial_shapes (L, 2) and level_start_index (L,) as tensors."""
    shapes = torch.tensor(inputs.spatial_shapes, device=inputs.value.device)
    areas = shapes.prod(1)
    return shapes, areas.cumsum(0) - areas


def _transformers() -> Attend:
    modeling = importlib.import_module("transformers.models.deformable_detr.modeling_deformable_detr")
    module = modeling.MultiScaleDeformableAttention()

    def attend(inputs: Inputs, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        # Plain PyTorch that mixes no dtypes.
        locations, weights = locations.to(value.dtype), weights.to(value.dtype)
        shapes, starts = _official_shapes(inputs)
        return module(value, shapes, list(inputs.spatial_shapes), starts, locations, weights, 64)

    return attend


def _mmcv() -> Attend:
    function = importlib.import_module("mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction

    def attend(inputs: Inputs, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return function.apply(value, *_official_shapes(inputs), locations, weights, 64)

    return attend
