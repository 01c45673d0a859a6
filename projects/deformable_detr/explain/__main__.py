"""Explains one image: ``python -m deformable_detr.explain IMAGE --model MODEL`` (see ``--help``)."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import add_model_arguments, make_parser, run
from ..files import make_folder
from ..loading import load_model
from .drawing import draw_explanation
from .explanation import explain
from .page import write_page

EPILOG = """examples:
  python -m deformable_detr.explain street.jpg --model deformable_detr_R_50_two_stage
  python -m deformable_detr.explain street.jpg --model output/mine --point 320 200 --layer 1
  python -m deformable_detr.explain street.jpg --model output/mine --class dog --ground-truth val.json
"""


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        "explain",
        description="Shows where the queries of a model look: writes NAME_explained.png and .html, a page "
        "to explore in any browser, without network.",
        epilog=EPILOG,
    )
    parser.add_argument("image", help="file or address")
    add_model_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("output/explain"), help="folder (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--detections", type=int, default=5, metavar="N", help="the N best (default: %(default)s)")
    which.add_argument(
        "--point", type=float, nargs=2, metavar=("X", "Y"), help="the detection nearest to this pixel of the image"
    )
    which.add_argument("--class", dest="class_name", metavar="NAME", help="all detections of this class")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of a detection (default: %(default)s)")
    parser.add_argument(
        "--layer", type=int, metavar="N", help="decoder layer to show first, from 1 (default: the last)"
    )
    parser.add_argument("--encoder-layer", type=int, metavar="N", help="the same for the encoder")
    parser.add_argument("--ground-truth", type=Path, metavar="JSON", help="COCO annotations that have this image")
    return parser.parse_args(args)


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    args = parse_args(argv)
    make_folder(args.output)
    loaded = load_model(args.model, args.weights, device=args.device, opts=args.opts)
    explanation = explain(
        loaded,
        args.image,
        detections=args.detections,
        point=args.point and tuple(args.point),
        class_name=args.class_name,
        score=args.score,
        ground_truth=args.ground_truth,
    )
    target = args.output / f"{Path(args.image).stem}_explained"
    layers = {"layer": args.layer, "encoder_layer": args.encoder_layer}
    print(draw_explanation(explanation, f"{target}.png", **layers))
    print(write_page(explanation, f"{target}.html", **layers))


if __name__ == "__main__":
    sys.exit(run(main))
