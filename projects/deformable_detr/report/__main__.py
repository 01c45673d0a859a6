"""``python -m deformable_detr.report OUTPUT_DIR`` (see ``--help``)."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import make_parser, run
from ..data.datasets import register_coco_data
from .write import write_report


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "report",
        description="Makes one HTML page of a finished or running training: curves, AP, precision and recall, "
        "confusion, the images with the most errors, configuration and versions.",
    )
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of train_net.py")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: report.html in OUTPUT_DIR)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also draw test images on one sheet, a PNG file")
    parser.add_argument("--num-images", type=int, default=8, help="images of each kind (default: %(default)s)")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score that counts (default: %(default)s)")
    parser.add_argument(
        "--val-json",
        metavar="FILE",
        help="annotations that the run was evaluated on, where its folder does not lead to them",
    )
    parser.add_argument("--val-images", metavar="FOLDER", help="their images")
    args = parser.parse_args(argv)
    if (args.val_json is None) != (args.val_images is None):
        parser.error("--val-json and --val-images must be given together")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    args = parse_args(argv)
    if args.val_json:
        register_coco_data("user_val", args.val_json, args.val_images)
    path = write_report(
        args.output_dir,
        args.output,
        sheet_path=args.sheet,
        dataset_name="user_val" if args.val_json else None,
        num_images=args.num_images,
        score_threshold=args.score,
    )
    for file in filter(None, (path, args.sheet)):
        print(str(file).encode(errors="replace").decode())  # The name of a folder may be no text.


if __name__ == "__main__":
    sys.exit(run(main))
