"""Draws a small COCO-format detection dataset of coloured shapes on textured, cluttered backgrounds.

Nothing is downloaded, and one seed always gives the same files::

    python tools/make_shapes_dataset.py output/shapes --train 1500 --val 100 --seed 0

writes ``train/*.jpg``, ``val/*.jpg``, ``train.json`` and ``val.json``. The colour says nothing about the
class, shapes overlap, sizes run from a few pixels to half the image, and some images hold no object at all.
The category ids have gaps on purpose, as COCO's have.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deformable_detr.cli import run
from deformable_detr.data.shapes import write_split


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write to; what is complete there already is kept")
    parser.add_argument("--train", type=int, default=1500, help="number of training images")
    parser.add_argument("--val", type=int, default=100, help="number of held-out images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for split, (name, num_images) in enumerate((("train", args.train), ("val", args.val))):
        if num_images < 1:
            parser.error(f"--{name} must be at least 1, got {num_images}")
        written = write_split(args.output, name, num_images, seed=args.seed, split=split)
        print(f"{args.output / name}.json: {num_images} images {'written' if written else 'already there'}")


if __name__ == "__main__":
    sys.exit(run(main))
