"""Looks through COCO-format files before the first step: what is wrong is counted, shown, and can be left out."""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from .coco_format import DatasetError, is_finite_box, is_readable_segmentation, read_coco_json
from .images import check_readable, upright_size

# Reading the header of an image takes about 0.2 ms where the disk is fast. Of larger datasets an evenly spaced sample
# of this size is opened; that the files exist is checked for all.
MAX_OPENED_IMAGES = 20_000
# Boxes that leave the image by less are rounding errors; training clips them.
TOLERANCE = 1.0  # px
_MAX_EXAMPLES = 3
_BEGINNING = 1 << 16  # bytes

Images = list[dict[str, Any]]


@dataclass
class Problems:
    """What is wrong with one annotation file.

    Attributes:
        path: the file.
        cases: what is wrong and what repairing does about it -> every case of it.
    """

    path: str
    cases: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, what: str, case: str, *, repair: str) -> None:
        self.cases[what, repair].append(case)

    def __bool__(self) -> bool:
        return bool(self.cases)

    def __str__(self) -> str:
        lines = [f"{self.path}:"]
        for (what, repair), cases in self.cases.items():
            examples = "; ".join(cases[:_MAX_EXAMPLES]) + ("; ..." if len(cases) > _MAX_EXAMPLES else "")
            lines.append(f"  {len(cases)} x {what} ({repair} by --repair): {examples}")
        return "\n".join(lines)


@dataclass
class CocoData:
    """An annotation file and its images, from which everything unusable has been left out.

    Attributes:
        content: in COCO's format; entries that were not changed are those of the file.
        problems: what was left out or changed.
    """

    json_file: str
    image_root: str
    content: dict[str, Any]
    problems: Problems

    def path(self, image: dict[str, Any]) -> str:
        return os.path.join(self.image_root, image["file_name"])

    def describe(self) -> str:
        """What there is to use, in a few words."""
        objects = [annotation for annotation in self.content["annotations"] if not annotation.get("iscrowd")]
        crowds = len(self.content["annotations"]) - len(objects)
        told = f"{len(self.content['images'])} images with {len(objects)} objects"
        return told + (f" and {crowds} crowd regions" if crowds else "")


def load_coco_data(
    json_file: str,
    image_root: str,
    *,
    content: dict[str, Any] | None = None,
    for_evaluation: bool = False,
    boxes_only: bool = True,
) -> CocoData:
    """Look through everything in an annotation file.

    Args:
        json_file: in COCO's "instances" format, with images, annotations and categories.
        image_root: folder of the images.
        content: of the file, where :func:`read_coco_json` has read it already.
        for_evaluation: also require of every object what COCO's evaluation reads, its area and whether it is a crowd.
        boxes_only: whether nobody reads the segmentations; otherwise those that cannot be read are faults as well.

    Raises:
        FileNotFoundError: if there is no such file.
        DatasetError: on what cannot be repaired: a file of another format, two categories of one id, or of one name and
            in use.
    """
    content = read_coco_json(json_file) if content is None else content
    data = CocoData(json_file, image_root, dict(content), Problems(json_file))
    twice = {key for key, group in _group(content["categories"], "id").items() if len(group) > 1}
    if twice:
        raise DatasetError(f"{json_file}: more than one category has the id {min(twice)}")
    used = {annotation["category_id"] for annotation in content["annotations"]}
    for name, group in _group(content["categories"], "name").items():
        # Results find a category by its name, and then the last one. Some exports begin with an unused category, named
        # like the whole data set, which may be the name of a class as well.
        if any(category["id"] in used for category in group[:-1]):
            ids = " and ".join(str(category["id"]) for category in group)
            raise DatasetError(f"{json_file}: every category must have a name of its own; {ids} are both {name!r}")
    data.content["images"] = _first_of_each_image(content["images"], data.problems)
    _join_entries_of_a_file(data)
    data.content["images"] = _readable_images(data.content["images"], data)
    data.content["annotations"] = _usable_annotations(data, known_images=_group(content["images"], "id").keys())
    data.content["annotations"] = [_without_ignore(a, data.problems) for a in data.content["annotations"]]
    if not boxes_only:
        data.content["annotations"] = _with_readable_segmentation(data)
    if for_evaluation:
        data.content["annotations"] = [_complete(a, data.problems) for a in data.content["annotations"]]
    return data


def drop_overlap(train: CocoData, val: CocoData) -> None:
    """Leaves images out of the training data whose file is, byte by byte, one of the validation data."""
    in_train, in_val = train.content["images"], val.content["images"]
    # Most files differ in their sizes, and most others in how they begin: few are read as a whole.
    for key in (os.path.getsize, partial(_digest, length=_BEGINNING)):
        in_train, in_val = _with_common_key(train, in_train, val, in_val, key)
    twins = {_digest(val.path(image)): image for image in in_val}
    shared = set()
    for image in in_train:
        if twin := twins.get(_digest(train.path(image))):
            case = f"{image['file_name']} is {twin['file_name']} of {val.json_file}"
            train.problems.add("image that is also in the validation data", case, repair="left out of training")
            shared.add(image["id"])
    train.content["images"] = [x for x in train.content["images"] if x["id"] not in shared]
    train.content["annotations"] = [x for x in train.content["annotations"] if x["image_id"] not in shared]


def _group(entries: Iterable[dict[str, Any]], key: str) -> dict[Hashable, list[dict[str, Any]]]:
    groups = defaultdict(list)
    for entry in entries:
        groups[entry[key]].append(entry)
    return groups


def _first_of_each_image(images: list[dict[str, Any]], problems: Problems) -> list[dict[str, Any]]:
    groups = _group(images, "id")
    for image_id, group in groups.items():
        for image in group[1:]:
            case = f"{image['file_name']} and {group[0]['file_name']} have id {image_id}"
            problems.add("image id that is used twice", case, repair="the later image left out")
    return [group[0] for group in groups.values()]


def _join_entries_of_a_file(data: CocoData) -> None:
    """Give the objects of later entries of an image file to its first: to each, those of the others are background."""
    first: dict[str, dict[str, Any]] = {}
    joined: dict[Hashable, Hashable] = {}
    for image in data.content["images"]:
        kept = first.setdefault(os.path.normpath(image["file_name"]), image)
        if kept is not image:
            joined[image["id"]] = kept["id"]
            case = f"{image['file_name']} has the ids {kept['id']} and {image['id']}"
            data.problems.add("image file that is listed twice", case, repair="objects given to the first entry")
    if not joined:
        return

    def identity(annotation: dict[str, Any]) -> tuple:
        image_id = annotation["image_id"]
        return joined.get(image_id, image_id), annotation["category_id"], repr(annotation.get("bbox"))

    data.content["images"] = [image for image in data.content["images"] if image["id"] not in joined]
    annotations = [a for a in data.content["annotations"] if a["image_id"] not in joined]
    # Of an entry that is a copy of the first one nothing is new.
    known = set(map(identity, annotations))
    for annotation in (a for a in data.content["annotations"] if a["image_id"] in joined):
        if identity(annotation) not in known:
            known.add(identity(annotation))
            annotations.append({**annotation, "image_id": joined[annotation["image_id"]]})
    data.content["annotations"] = annotations


def _readable_images(images: list[dict[str, Any]], data: CocoData) -> list[dict[str, Any]]:
    step = max(1, math.ceil(len(images) / MAX_OPENED_IMAGES))
    with ThreadPoolExecutor() as pool:
        flaws = pool.map(lambda item: _find_flaw(item[1], data, opened=item[0] % step == 0), enumerate(images))
        kept = []
        for image, flaw in zip(images, flaws, strict=True):
            if flaw is None:
                kept.append(image)
            else:
                data.problems.add(*flaw, repair="image left out")
    return kept


def _find_flaw(image: dict[str, Any], data: CocoData, *, opened: bool) -> tuple[str, str] | None:
    """Return what is wrong with an image file, and the case; None if nothing is."""
    path = data.path(image)
    if not os.path.isfile(path):
        return "missing image file", path
    if not opened:
        return None
    try:
        with Image.open(path) as header:
            size = upright_size(header)
            check_readable(header)
    # Pillow reports broken files as OSError, SyntaxError (PNG) or ValueError (sizes).
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return "unreadable image file", f"{path} ({error})"
    expected = (image["width"], image["height"])
    if size != expected:
        return "image of another size than in the annotations", f"{path} is {_times(size)}, not {_times(expected)}"
    return None


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _usable_annotations(data: CocoData, *, known_images: Iterable[Hashable]) -> list[dict[str, Any]]:
    """Return the annotations of the images that are left, with boxes inside of them and ids of their own."""
    known_images = set(known_images)
    images = {image["id"]: image for image in data.content["images"]}
    categories = {category["id"] for category in data.content["categories"]}
    all_annotations = data.content["annotations"]
    ids: set[Hashable] = set()
    free_id = 1 + max((a["id"] for a in all_annotations if isinstance(a.get("id"), int)), default=0)
    kept = []
    for annotation in all_annotations:
        name = f"annotation {annotation.get('id')}"
        if annotation["image_id"] not in known_images:
            case = f"{name}: image {annotation['image_id']}"
            data.problems.add("object of an unknown image", case, repair="left out")
        elif annotation["category_id"] not in categories:
            case = f"{name}: category {annotation['category_id']}"
            data.problems.add("object of an unknown category", case, repair="left out")
        elif annotation["image_id"] in images:
            annotation = _with_box_inside(annotation, images[annotation["image_id"]], data.problems)
            if annotation is None:
                continue
            if annotation.get("id") in ids or annotation.get("id") is None:
                data.problems.add("missing id, or id that is used twice, of an object", name, repair="numbered anew")
                annotation = {**annotation, "id": free_id}
                free_id += 1
            ids.add(annotation["id"])
            kept.append(annotation)
    return kept


def _with_box_inside(annotation: dict[str, Any], image: dict[str, Any], problems: Problems) -> dict[str, Any] | None:
    """Return the annotation, its box clipped to the image where it leaves it; None if no box is left."""
    box = annotation.get("bbox")
    case = f"annotation {annotation.get('id')}, {image['file_name']}: {box}"
    if not is_finite_box(box):
        problems.add("box that is not four finite numbers", case, repair="left out")
        return None
    if box[2] <= 0 or box[3] <= 0:
        problems.add("box without area", case, repair="left out")
        return None
    x, y, w, h = box
    width, height = image["width"], image["height"]
    if x >= -TOLERANCE and y >= -TOLERANCE and x + w <= width + TOLERANCE and y + h <= height + TOLERANCE:
        return annotation
    case += f" in {width}x{height}"
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if x1 <= x0 or y1 <= y0:
        problems.add("box outside of its image", case, repair="left out")
        return None
    problems.add("box that leaves its image", case, repair="clipped")
    return {**annotation, "bbox": [x0, y0, x1 - x0, y1 - y0]}


def _without_ignore(annotation: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """Return the annotation as a crowd where it is marked "ignore", which Detectron2 does not support."""
    if not annotation.get("ignore"):
        return annotation
    problems.add('object with "ignore"', f"annotation {annotation['id']}", repair="treated as a crowd")
    return {**annotation, "ignore": 0, "iscrowd": 1}


def _with_readable_segmentation(data: CocoData) -> list[dict[str, Any]]:
    kept = []
    for annotation in data.content["annotations"]:
        if is_readable_segmentation(annotation.get("segmentation")):
            kept.append(annotation)
        else:
            case = f"annotation {annotation['id']}"
            data.problems.add("segmentation that Detectron2 cannot read", case, repair="object left out")
    return kept


def _complete(annotation: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """Return the annotation with all that the evaluation reads."""
    if "area" in annotation and "iscrowd" in annotation:
        return annotation
    what = "object without area or iscrowd, which the evaluation reads"
    problems.add(what, f"annotation {annotation['id']}", repair="filled in from the box")
    return {"area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0, **annotation}


def _with_common_key(
    train: CocoData, in_train: Images, val: CocoData, in_val: Images, key: Callable[[str], Hashable]
) -> tuple[Images, Images]:
    """Return the images on either side whose files have a key that one on the other side has too."""
    train_keys = [key(train.path(image)) for image in in_train]
    val_keys = [key(val.path(image)) for image in in_val]
    common = set(train_keys) & set(val_keys)
    return (
        [image for image, own in zip(in_train, train_keys, strict=True) if own in common],
        [image for image, own in zip(in_val, val_keys, strict=True) if own in common],
    )


def _digest(path: str, length: int = -1) -> bytes:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(length)).digest()
