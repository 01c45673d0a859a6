"""Exports a model as a program: ``python -m deformable_detr.export`` (see ``--help``)."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..cli import add_model_arguments, make_parser, run
from ..detect import read_image
from ..loading import load_model
from .agreement import TOLERANCE, DisagreementError
from .exporter import FORMATS, export_model
from .onnx_format import DEFAULT_OPSET, NEWEST_OPSET, OLDEST_OPSET
from .program import InputShape

DESCRIPTION = """Exports a model as a program that runs without this package.

input   images       (N, 3, H, W) uint8, RGB, resized, each in the top left corner of the canvas
        image_sizes  (N, 2) int64, height and width of each image without its padding
output  boxes        (N, k, 4) float32, xyxy in [0, 1] of each image without its padding
        scores       (N, k) float32, best first
        labels       (N, k) int64
The file holds the class names and the sizes to resize to. It gets its name after it has agreed with the model."""
EPILOG = """examples:
  python -m deformable_detr.export --model output/demo --format onnx --output model.onnx
  python tools/run_onnx.py photo.jpg --model model.onnx
  python -m deformable_detr.export --model output/demo --format onnx --fixed-size 800 1344 --batch 1

formats:
  onnx          batch and image size are dynamic. --op custom leaves nodes deformable_detr::MSDeformAttn in it, for
                runtimes to which you have added that op.
  torch_export  for torch.export.load; batch and image size are dynamic, with sides longer than the coarsest stride
                (64 pixels with four levels, 32 with one, 16 with DC5). --op custom leaves
                deformable_detr::ms_deform_attn in it: import deformable_detr.layers before loading.
  torchscript   for torch.jit.load and LibTorch; sizes are fixed, by default batch 1 and the config's test size as
                height and width, rounded up to multiples of what the model pads to. PyTorch has deprecated TorchScript:
                prefer torch_export where you can choose.
Files of the last two compute on the --device that they were exported on, and load where there is one."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("export", description=DESCRIPTION, epilog=EPILOG)
    add_model_arguments(parser)
    # Whatever this machine has: a file is for others.
    parser.set_defaults(device="cpu")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write, also over an older one (default: a new file of the model's name here)",
    )
    parser.add_argument(
        "--opset", type=int, help=f"of ONNX, {OLDEST_OPSET} to {NEWEST_OPSET} (default: {DEFAULT_OPSET})"
    )
    parser.add_argument(
        "--fixed-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="constant height and width of the canvas, pixels; multiples of what the model pads to",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="constant number of images")
    parser.add_argument(
        "--op",
        choices=("decomposed", "custom"),
        default="decomposed",
        help="ms_deform_attn as grid_sample, which every runtime has (default), or as a node of its own",
    )
    parser.add_argument(
        "--check",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images to compare on, and a smaller copy of the first where all are of one size (default: two that are "
        "drawn)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 1 for a program that disagrees with the model."""
    _start_logging()
    args = parse_args(argv)
    start = time.perf_counter()
    path = args.output or new_file(args.model, FORMATS[args.format].suffix)
    size = None if args.fixed_size is None else tuple(args.fixed_size)
    pictures = [read_image(image) for image in args.check]
    loaded = load_model(args.model, args.weights, device=args.device, opts=args.opts)
    try:
        differences = export_model(
            loaded,
            path,
            format_name=args.format,
            shape=InputShape(args.batch, size),
            decompose=args.op == "decomposed",
            opset=args.opset,
            pictures=pictures,
        )
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    boxes, scores = max(d.boxes for d in differences), max(d.scores for d in differences)
    print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - start:.0f} s. Largest difference to the "
        f"model in {len(differences)} batches: boxes {boxes:.1e}, scores {scores:.1e} (at most {TOLERANCE:g})"
    )
    return 0


def new_file(model: str, suffix: str) -> Path:
    """Return the file that a model, named as on the command line, is exported to unless another one is asked for.

    Raises:
        FileExistsError: if it is there already, perhaps of another model.
    """
    path = Path(f"{Path(model).stem if os.path.isfile(model) else Path(model).resolve().name}{suffix}")
    if path.exists():
        raise FileExistsError(f"{path} exists already: to write over it, give --output {path}")
    return path


def _start_logging() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("deformable_detr.export").setLevel(logging.INFO)
    # It warns of every constant that it leaves alone.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(run(main))
