"""Writes a COCO-format annotation file with chosen images of another one, and all of its categories.

Together with the data flags of ``train_net.py`` this trains on a handful of images, for instance to see a model
overfit them::

    python tools/subset_coco.py annotations/instances_train2017.json output/two_images.json 72 309
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from deformable_detr.cli import run
from deformable_detr.files import write_json


def subset(content: dict, image_ids: Collection[int]) -> dict:
    """Return COCO-format content with only these images and their annotations.

    Raises:
        ValueError: an image id does not occur.
    """
    missing = set(image_ids) - {image["id"] for image in content["images"]}
    if missing:
        raise ValueError(f"there are no images with the ids {sorted(missing)}")
    return {
        **content,
        "images": [image for image in content["images"] if image["id"] in image_ids],
        "annotations": [entry for entry in content["annotations"] if entry["image_id"] in image_ids],
    }


def read_annotations(path: Path) -> dict:
    """Read an annotation file.

    Raises:
        ValueError: it is not JSON, or has no images and annotations.
    """
    try:
        content = json.loads(path.read_bytes())  # Bytes may begin with a byte order mark.
    except ValueError as error:
        raise ValueError(f"{path} must be JSON in COCO's format: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{path} must be in COCO's format, with images and annotations")
    return content


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="annotation file to choose from")
    parser.add_argument("target", type=Path, help="annotation file to write")
    parser.add_argument("image_ids", type=int, nargs="+", metavar="IMAGE_ID")
    args = parser.parse_args(argv)
    chosen = subset(read_annotations(args.source), set(args.image_ids))
    args.target.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.target, chosen)
    print(f"{args.target}: {len(chosen['images'])} images, {len(chosen['annotations'])} annotations")


if __name__ == "__main__":
    sys.exit(run(main))
