"""Latency, throughput, memory, parameters and FLOPs of whole models beside other installed implementations."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.structures import ImageList
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from ..cli import add_model, add_overrides, default_device, positive_int
from ..loading import DTYPES
from ..modeling import SetPredictionDetector, prepare_for_inference
from .launches import count_launches, format_launches, sum_by_phase
from .peers import OURS, TORCHVISION, TRANSFORMERS, Batch, Ours, build, find_peers, make_batch
from .timing import CLOCKS, Call, on_device, peak_memory, printing_and_saving, summarise, time_in_turns

NOTES = """\
ms: median of the rounds; spread: quartile range / median; ratio: median over rounds of time / time of the first row of
the same input; MiB: peak on top of weights and input; GFLOPs: multiply-adds, as papers count (first rows only). The
memory of CUDA graphs (prepared) is kept for them, and not measured."""

LAUNCH_NOTES = """\
Operations that PyTorch dispatches in one call, the first one (which fills caches) left out: ATen's, without views and
empty allocations. The optimizer's come on top of the model's, forward and backward."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line of this benchmark."""
    add_common_arguments(parser, size="800x1066", variant="deformable_detr_R_50_two_stage")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["eager"],
        choices=["eager", "compiled", "prepared"],
        help="of our model; compiled: its transformer; prepared: prepare_for_inference in each --precision",
    )
    parser.add_argument(
        "--cuda-graphs", action=argparse.BooleanOptionalAction, help="of prepared models (default: on CUDA)"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        default=[TRANSFORMERS, TORCHVISION[0]],
        choices=[TRANSFORMERS, *TORCHVISION],
        help="transformers has the same weights; torchvision's detectors have random ones",
    )
    parser.set_defaults(run=run)


def add_common_arguments(parser: argparse.ArgumentParser, *, size: str, variant: str) -> None:
    """Arguments of the benchmarks of whole models."""
    add_model(parser, "--variants", dest="variants", nargs="+", default=[variant], help="(default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", default=[_parse_size(size)], type=_parse_size, metavar="HxW")
    parser.add_argument("--batches", nargs="+", type=positive_int, default=[1])
    parser.add_argument(
        "--precision",
        "--dtypes",
        nargs="+",
        default=["float32"],
        choices=["tf32", *DTYPES],
        dest="dtypes",
        help="float32: as PyTorch is set; tf32: for products and convolutions on CUDA; 16 bits: autocast",
    )
    parser.add_argument("--devices", nargs="+", default=[default_device()])
    parser.add_argument("--rounds", type=positive_int, default=5, help="repetitions; every implementation runs in each")
    parser.add_argument("--warmup", type=int, default=1, help="untimed calls of each before the rounds")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="processor: for a busy machine, one thread")
    parser.add_argument(
        "--launches",
        nargs="?",
        type=int,
        const=3,
        metavar="DEPTH",
        help="measure nothing, and count the operations of a call by module, DEPTH names deep (3)",
    )
    parser.add_argument("--no-memory", action="store_true", help="its profile takes longer than the call on the CPU")
    # Other options may follow these overrides, as they always could.
    add_overrides(parser, nargs="+")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")


def run(args: argparse.Namespace) -> None:
    """Measure every combination, print a table and write the JSON file."""
    run_combinations(make_contenders, measure, args, NOTES)


@dataclass(frozen=True)
class Contender:
    """An implementation in one of its forms: what tells it from others in the table, and the call to measure."""

    columns: dict[str, str]
    model: nn.Module
    call: Call


def run_combinations(
    make_contenders: Callable[[str, Batch, argparse.Namespace], list[Contender]],
    measure: Callable[[list[Contender], str, Batch, argparse.Namespace], list[dict]],
    args: argparse.Namespace,
    notes: str,
) -> None:
    """Measure, or count, the contenders of every variant and batch of :func:`add_common_arguments`."""
    torch.set_num_threads(args.threads)
    if args.launches is not None:
        measure, notes = show_launches, LAUNCH_NOTES
    with printing_and_saving(args, notes) as rows:
        for device, variant, size, number in itertools.product(args.devices, args.variants, args.sizes, args.batches):
            common = {"variant": variant, "device": device, "size": "x".join(map(str, size)), "N": number}
            with on_device(device):
                batch = make_batch(*size, size=number, device=device)
                contenders = make_contenders(variant, batch, args)
                found = measure(contenders, variant, batch, args)
            rows += [{**common, **c.columns, **row} for c, row in zip(contenders, found, strict=True)]


def make_contenders(variant: str, batch: Batch, args: argparse.Namespace) -> list[Contender]:
    """Our model in every mode, and its peers, in every dtype."""
    contenders = []
    for name in [OURS, *find_peers(args.peers)]:
        for mode in args.modes if name == OURS else ["eager"]:
            model = build(name, variant, batch, opts=args.opts)
            if mode == "compiled":
                model.model.transformer.compile()
            for dtype in args.dtypes:
                detector = prepare(model, dtype, args) if mode == "prepared" else model
                columns = {"implementation": name, "dtype": dtype, "mode": mode}
                contenders.append(Contender(columns, detector, make_inference(detector, batch, dtype=dtype)))
    return contenders


def prepare(ours: Ours, dtype: str, args: argparse.Namespace) -> Ours:
    """Our model prepared for inference in a precision of ``--precision``."""
    prepared = prepare_for_inference(ours.model, dtype=DTYPES.get(dtype), cuda_graphs=args.cuda_graphs)
    return Ours(prepared).eval()


def measure(
    contenders: list[Contender], variant: str, batch: Batch, args: argparse.Namespace
) -> list[dict[str, object]]:
    """Measure times, memory and size of every contender."""
    flops = count_flops(build(OURS, variant, batch, opts=args.opts).model, batch)
    rows = []
    for contender, numbers in zip(contenders, time_contenders(contenders, batch, args), strict=True):
        prepared = contender.columns["mode"] == "prepared"
        replayed = prepared and batch.device.startswith("cuda") and args.cuda_graphs is not False
        own_flops = contender.columns["implementation"] in (OURS, TRANSFORMERS)
        rows.append(
            {
                **numbers,
                "images/s": 1e3 * len(batch.images) / numbers["ms"],
                "MiB": None if args.no_memory or replayed else peak_memory(contender.call, batch.device),
                "M params": sum(p.numel() for p in contender.model.parameters()) / 1e6,
                "GFLOPs": flops if own_flops else None,
            }
        )
    return rows


def time_contenders(contenders: list[Contender], batch: Batch, args: argparse.Namespace) -> list[dict[str, float]]:
    """Medians, spreads and ratios to the first, measured in turns."""
    calls = {i: contender.call for i, contender in enumerate(contenders)}
    times = time_in_turns(calls, rounds=args.rounds, warmup=args.warmup, device=batch.device, clock=args.clock)
    return [summarise(samples, times[0]) for samples in times.values()]


def show_launches(
    contenders: list[Contender], variant: str, batch: Batch, args: argparse.Namespace
) -> list[dict[str, int]]:
    """Print the operations of every contender by module; returns their sums."""
    rows = []
    for contender in contenders:
        contender.call()  # It fills caches, and the optimizer makes its state.
        counts = count_launches(contender.call, contender.model)
        print(
            f"{variant}: {', '.join(contender.columns.values())}", format_launches(counts, args.launches), "", sep="\n"
        )
        rows.append(sum_by_phase(counts))
    return rows


def make_inference(model: nn.Module, batch: Batch, *, dtype: str) -> Callable[[], object]:
    """Return a call that detects in ``batch``."""

    def call() -> object:
        with torch.inference_mode(), tf32(dtype), autocast(batch, dtype):
            return model(batch)

    return call


def autocast(batch: Batch, dtype: str) -> contextlib.AbstractContextManager:
    """Return what runs a model in 16 bits; nothing for 32."""
    if dtype in ("float32", "tf32"):
        return contextlib.nullcontext()
    return torch.autocast(batch.images[0].device.type, DTYPES[dtype])


@contextlib.contextmanager
def tf32(dtype: str) -> Iterator[None]:
    """Use the matrix units for float32 if ``dtype`` is "tf32", backward passes included."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    if dtype == "tf32":
        products.allow_tf32 = convolutions.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def count_flops(model: SetPredictionDetector, batch: Batch) -> float:
    """Billions of multiply-adds of our model for one image."""
    pixels = model.preprocess_image([{"image": batch.images[0]}]).tensor
    analysis = FlopCountAnalysis(_Predict(model), pixels)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("deformable_detr::ms_deform_attn", _count_op)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _count_attention)
    return analysis.total() / 1e9


class _Predict(nn.Module):
    """Pixels to predictions: the tracer that counts takes tensors alone."""

    def __init__(self, model: SetPredictionDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.model.predict(ImageList(pixels, [pixels.shape[2:]]))


def _count_op(inputs: list, outputs: list) -> int:
    """Four corners of every sampling point, D channels each."""
    value, weights = inputs[0].type().sizes(), inputs[3].type().sizes()
    return 4 * value[3] * torch.Size(weights).numel()


def _count_attention(inputs: list, outputs: list) -> int:
    """Two products of every query (..., Lq, D) with every key (..., Lk, D)."""
    query, key = inputs[0].type().sizes(), inputs[1].type().sizes()
    return 2 * torch.Size(query).numel() * key[-2]


def _parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not all(side.isdecimal() and int(side) for side in (height, width)):
        raise argparse.ArgumentTypeError(f"a size must be HEIGHTxWIDTH in pixels, such as 800x1066, got {text!r}")
    return int(height), int(width)
