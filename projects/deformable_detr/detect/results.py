"""Detections as a COCO-format file, and the scores from which they are worth showing."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import show, write_json, write_text
from ..wording import name_first

# In the output folder of a training: what its last evaluation detected, and what a report made of it.
RESULTS = Path("inference") / "coco_instances_results.json"
BEST_SCORES = Path("inference") / "best_scores.json"

CSV_COLUMNS = ("file_name", "frame_index", "category_id", "category", "score", "x", "y", "width", "height")


def read_best_score(folder: object) -> float:
    """Return the score with the best F1 over all categories in the last evaluation of a run.

    Args:
        folder: output folder of a training.

    Raises:
        ValueError: it is not such a folder, has no report yet, or one from before the last evaluation.
    """
    if not isinstance(folder, str | os.PathLike) or not os.path.isdir(folder):
        raise ValueError(f'the score "best" is for the output folder of a training, got {folder}')
    path, results = Path(folder, BEST_SCORES), Path(folder, RESULTS)
    remedy = f"make a report first: python -m deformable_detr.report {folder}"
    if not path.is_file():
        raise ValueError(f"the best score is not known, as there is no {path}; {remedy}")
    if results.is_file() and results.stat().st_mtime > path.stat().st_mtime:
        raise ValueError(f"{path} is older than the last evaluation; {remedy}")
    return float(json.loads(path.read_text(encoding="utf-8"))["score"])


@dataclass(frozen=True)
class GroundTruthIds:
    """The ids of an annotation file, for results that are to be compared with it.

    Attributes:
        images: file name -> image id.
        categories: name -> category id.
    """

    images: Mapping[str, int]
    categories: Mapping[str, int]

    @classmethod
    def load(cls, path: Path) -> "GroundTruthIds":
        """Read a file in COCO's "instances" format.

        Raises:
            ValueError: if it is not such a file.
        """
        try:
            # As bytes, so that a byte order mark is read.
            content = json.loads(path.read_bytes())
            images = {image["file_name"]: image["id"] for image in content["images"]}
            return cls(images, {category["name"]: category["id"] for category in content["categories"]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be a COCO annotation file with images and categories: {error!r}") from error

    def check(self, *, names: Sequence[str], class_names: Sequence[str]) -> None:
        """Refuse images and classes that the annotations do not have.

        Raises:
            ValueError: naming them.
        """
        absent = [name for name in names if name not in self.images]
        absent += [name for name in class_names if name not in self.categories]
        if absent:
            raise ValueError(f"the annotation file has no image or category {name_first(absent)}")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"every image must be given once, got several files {name_first(twice)}")


class CocoResults:
    """Collects detections; :meth:`save` writes them as one COCO dataset, :meth:`save_csv` as a table.

    ``pycocotools.coco.COCO(file)`` reads the file, and its "annotations" are results as ``COCO(...).loadRes`` takes
    them: image_id, category_id, bbox (x, y, width, height) in pixels, score; with id, area and iscrowd beside them.

    Args:
        categories: name -> id, of all classes.
        image_ids: file name -> id; by default images are numbered from 1.
    """

    def __init__(self, categories: Mapping[str, int], image_ids: Mapping[str, int] | None = None) -> None:
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self._categories = categories
        self._image_ids = image_ids

    @property
    def has_own_ids(self) -> bool:
        """Whether images are numbered here; if not, their names must be those of the annotation file."""
        return self._image_ids is None

    def add(self, name: str, size: tuple[int, int], detections: Sequence[dict], **fields: object) -> None:
        """Add an image and what was detected in it.

        Args:
            name: for "file_name".
            size: (H, W) in pixels.
            detections: as :meth:`Predictor.to_json` gives.
            fields: further entries of the image.
        """
        image_id = len(self.images) + 1 if self._image_ids is None else self._image_ids[name]
        image = {"id": image_id, "file_name": name, "height": size[0], "width": size[1], **fields}
        self.images.append(image)
        for detection in detections:
            width, height = detection["bbox"][2:]
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": self._categories[detection["category"]],
                    "bbox": detection["bbox"],
                    "area": round(width * height, 3),
                    "iscrowd": 0,
                    "score": detection["score"],
                }
            )

    def save(self, path: Path) -> None:
        """Write the file; names that are not UTF-8 keep Python's escapes, which ``json`` reads back."""
        categories = [{"id": id, "name": name} for name, id in self._categories.items()]
        content = {"images": self.images, "categories": categories, "annotations": self.annotations}
        write_json(path, content)

    def save_csv(self, path: Path) -> None:
        """Write one row per detection, below a row of ``CSV_COLUMNS``; the box in pixels."""
        images = {image["id"]: image for image in self.images}
        names = {id: name for name, id in self._categories.items()}
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(CSV_COLUMNS)
        for found in self.annotations:
            image, category = images[found["image_id"]], found["category_id"]
            row = [show(image["file_name"]), image.get("frame_index"), category, names[category]]
            rows.writerow([*row, found["score"], *found["bbox"]])
        write_text(path, text.getvalue())
