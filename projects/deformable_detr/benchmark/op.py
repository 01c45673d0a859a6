"""Time of ms_deform_attn beside its PyTorch twin and other installed implementations, and its share of the bound."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..cli import default_device, positive_int
from ..layers import ms_deform_attn, ms_deform_attn_pytorch
from .shapes import SHAPES, Inputs, make_inputs
from .timing import on_device, printing_and_saving, summarise, time_call, time_cold_and_settled

Attend = Callable[[Inputs, Tensor, Tensor, Tensor], Tensor]
OURS, TWIN, TRANSFORMERS, MMCV = "deformable_detr", "twin", "transformers", "mmcv"
DTYPES = ("float64", "float32", "bfloat16", "float16")
SETTLE_MS = 20
CALLS_PER_GRAPH = 10
NOTES = """\
ms: median of the rounds, in each of which a call is repeated for 20 ms and then timed as many times; spread: quartile
range / median; ratio: median over rounds of time / our time; bwd ms: what forward + backward takes longer than forward;
cold ms, cold ratio: the same for a single call, with the caches as another implementation left them;
bound: every tensor read or written once at the measured copy speed of memory; share: bound / ms;
GB/s: corner rows read, and in the backward pass added to, per second, which caches serve."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line of this benchmark."""
    parser.add_argument("--shapes", nargs="+", default=["r50_encoder", "r50_decoder"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES, help="of value")
    parser.add_argument("--devices", nargs="+", default=[default_device()])
    parser.add_argument("--distributions", nargs="+", default=["grid"], choices=["grid", "uniform"])
    parser.add_argument("--batches", nargs="+", type=positive_int, default=[1])
    parser.add_argument("--rounds", type=positive_int, default=5, help="repetitions; every implementation runs in each")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=[TWIN, TRANSFORMERS, MMCV],
        choices=[TWIN, TRANSFORMERS, MMCV],
        help="those that are installed",
    )
    parser.add_argument(
        "--cuda-graphs", action="store_true", help=f"{CALLS_PER_GRAPH} calls at a time, without what launching takes"
    )
    parser.add_argument("--deterministic", action="store_true", help="sums that do not depend on their order")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure every combination, print a table and write the JSON file."""
    torch.set_num_threads(args.threads)
    # Some peers have no deterministic backward pass: they warn.
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    with printing_and_saving(args, NOTES) as rows:
        for device in args.devices:
            with on_device(device):
                bandwidth = measure_bandwidth(device)
                peers = find_peers(device, args.peers)
                for combination in itertools.product(args.shapes, args.batches, args.dtypes, args.distributions):
                    rows += measure(
                        *combination,
                        device=device,
                        rounds=args.rounds,
                        bandwidth=bandwidth,
                        peers=peers,
                        graphs=args.cuda_graphs,
                    )
    torch.use_deterministic_algorithms(False)


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
    graphs: bool = False,
) -> list[dict]:
    """Rows of the table for one input: forward and forward + backward of every implementation, in turns."""
    inputs = make_inputs(
        SHAPES[name], batch=batch, dtype=getattr(torch, dtype), device=device, distribution=distribution
    )
    if device == "cpu" and inputs.value.element_size() == 2:
        # PyTorch's grid_sample computes offsets in 16 bits there and reads other memory: NaN or a crash for maps that
        # are not contiguous, as transformers' are.
        peers = {peer: attend for peer, attend in peers.items() if peer != TRANSFORMERS}
    rows = []
    forward_ms: dict[str, float] = {}
    for backward in (False, True):
        calls = {peer: _make_call(attend, inputs, backward) for peer, attend in peers.items()}
        if graphs:
            calls = {peer: capture(call) for peer, call in calls.items()}
        for call in calls.values():
            call()  # What only the very first call does.
        cold_times, times = time_cold_and_settled(calls, rounds=rounds, device=device, settle_ms=SETTLE_MS)
        passes = (False, True) if backward else (False,)
        bound = 1e3 * sum(inputs.bytes_once(backward=b) for b in passes) / bandwidth
        gathered = sum(inputs.bytes_gathered(backward=b) for b in passes)
        for peer, samples in times.items():
            numbers = summarise(samples, times[OURS])
            cold = summarise(cold_times[peer], cold_times[OURS])
            if graphs:
                numbers["ms"] /= CALLS_PER_GRAPH
                cold["ms"] /= CALLS_PER_GRAPH
            if not backward:
                forward_ms[peer] = numbers["ms"]
            rows.append(
                {
                    "shape": name,
                    "N": batch,
                    "dtype": dtype,
                    "where": f"{device} {distribution}",
                    "pass": "fwd+bwd" if backward else "fwd",
                    "implementation": peer,
                    **numbers,
                    "bwd ms": numbers["ms"] - forward_ms[peer] if backward else None,
                    "cold ms": cold["ms"],
                    "cold ratio": cold["ratio"],
                    "bound ms": bound,
                    "share": bound / numbers["ms"],
                    "GB/s": gathered / numbers["ms"] / 1e6,
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


def capture(call: Callable[[], None]) -> Callable[[], None]:
    """Record ``CALLS_PER_GRAPH`` calls as a CUDA graph; returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # What only the very first calls do must not be recorded.
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    return graph.replay


def measure_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy within main memory."""
    source = torch.ones((1 << 30 if device.startswith("cuda") else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    milliseconds = min(time_call(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.nbytes / milliseconds * 1e3


def find_peers(device: str, names: Sequence[str]) -> dict[str, Attend]:
    """Ours, and those of ``names`` that are installed and run on this device."""
    peers: dict[str, Attend] = {
        OURS: lambda inputs, value, locations, weights: ms_deform_attn(value, inputs.spatial_shapes, locations, weights)
    }
    if TWIN in names:
        peers[TWIN] = lambda inputs, value, locations, weights: ms_deform_attn_pytorch(
            value, inputs.spatial_shapes, locations, weights
        )
    if TRANSFORMERS in names and importlib.util.find_spec("transformers") is not None:
        peers[TRANSFORMERS] = _transformers()
    if MMCV in names and device.startswith("cuda") and importlib.util.find_spec("mmcv") is not None:
        peers[MMCV] = _mmcv()
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
