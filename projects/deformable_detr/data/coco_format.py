"""COCO's "instances" format: what a file must look like before anything else reads it."""

import codecs
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class DatasetError(ValueError):
    """Data that cannot be trained on as it is; the message names the file and what is wrong with it."""


class _Rule(NamedTuple):
    words: str
    holds: Callable[[Any], bool]
    is_required: bool = True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_image_id(value: Any) -> bool:
    # COCO's own are whole numbers; its evaluation takes text as well, which other tools write.
    return _is_id(value) or isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, int) and value in (0, 1)


# Boxes and missing or repeated ids of objects are not here: checks.py counts and repairs them.
_RULES = {
    "images": {
        "id": _Rule("a whole number or text", _is_image_id),
        "file_name": _Rule("text", lambda value: isinstance(value, str)),
        "width": _Rule("a number", _is_number),
        "height": _Rule("a number", _is_number),
    },
    "annotations": {
        "image_id": _Rule("a whole number or text", _is_image_id),
        "category_id": _Rule("a whole number", _is_id),
        "id": _Rule("a whole number or null", lambda value: value is None or _is_id(value), is_required=False),
        "area": _Rule("a number", _is_number, is_required=False),
        "iscrowd": _Rule("0 or 1", _is_flag, is_required=False),
        "ignore": _Rule("0 or 1", _is_flag, is_required=False),
        "segmentation": _Rule(
            "a list, an object or null",
            lambda value: value is None or isinstance(value, list | dict),
            is_required=False,
        ),
    },
    "categories": {
        "id": _Rule("a whole number", _is_id),
        "name": _Rule("text", lambda value: isinstance(value, str)),
    },
}


def read_coco_json(json_file: str, *, kinds: Sequence[str] = tuple(_RULES)) -> dict[str, Any]:
    """Read annotations in COCO's "instances" format.

    Args:
        kinds: the lists in it that must be there and are checked: all by default.

    Raises:
        FileNotFoundError: if there is no such file.
        DatasetError: if the file is not in COCO's format; see :func:`check_coco_format`.
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"there is no annotation file {json_file!r}")
    # As bytes: json then finds out the encoding, with the byte order marks that editors on Windows write.
    with open(json_file, "rb") as file:
        try:
            content = json.load(file)
        # ValueError is also that of bytes that are no text.
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{json_file} must be JSON in COCO format: {error}") from error
    check_coco_format(content, json_file, kinds=kinds)
    return content


def has_byte_order_mark(json_file: str) -> bool:
    """Whether a file begins with a byte order mark, which pycocotools does not read."""
    with open(json_file, "rb") as file:
        return file.read(4).startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))


def check_coco_format(content: Any, json_file: str, *, kinds: Sequence[str] = tuple(_RULES)) -> None:
    """Check that images, annotations and categories have their fields, and these their types.

    Args:
        content: of the file.
        json_file: its name, for the message.
        kinds: as for :func:`read_coco_json`.

    Raises:
        DatasetError: on the first entry of another form, naming its place, the rule and the value.
    """
    keys = content if isinstance(content, dict) else ()
    if absent := [kind for kind in kinds if kind not in keys]:
        raise DatasetError(f"{json_file} must be in COCO format with {', '.join(kinds)}; no {absent}")
    for kind in kinds:
        rules = _RULES[kind]
        if not isinstance(content[kind], list):
            raise DatasetError(f"{json_file}: {kind} must be a list, got {_shorten(content[kind])}")
        for index, entry in enumerate(content[kind]):
            _check_entry(entry, rules, place=f"{json_file}: {kind}[{index}]")
    if "images" in kinds and len({type(image["id"]) for image in content["images"]}) > 1:
        # Detectron2 sorts them.
        raise DatasetError(f"{json_file}: the ids of images must be all whole numbers or all text, got both")
    if "categories" in kinds and not content["categories"]:
        raise DatasetError(f"{json_file} must list at least one category")


def is_finite_box(box: Any) -> bool:
    """Whether this has the form of COCO's [x, y, width, height]."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        return False
    return all(math.isfinite(value) for value in box)


def check_boxes(annotations: Iterable[dict[str, Any]], json_file: str) -> None:
    """Check the boxes, where nobody repairs them.

    Raises:
        DatasetError: on the first that :func:`is_finite_box` does not hold for.
    """
    for annotation in annotations:
        if not is_finite_box(box := annotation.get("bbox")):
            where = f"{json_file}: annotation {annotation.get('id')} of image {annotation['image_id']}"
            raise DatasetError(f"{where}: bbox must be four finite numbers, got {_shorten(box)}")


def is_readable_segmentation(segmentation: Any) -> bool:
    """Whether Detectron2's loader and masks can read a segmentation; it leaves out, or dies of, any other.

    Args:
        segmentation: polygons, each [x, y, x, y, ...] of three points or more, of which at least one must be left; or
            run lengths, {"counts": ..., "size": [height, width]}; or nothing.
    """
    if not segmentation:
        return True
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        has_size = isinstance(size, list) and len(size) == 2 and all(map(_is_id, size))
        return has_size and isinstance(segmentation.get("counts"), list | str)
    is_numbers = all(isinstance(polygon, list) and all(map(_is_number, polygon)) for polygon in segmentation)
    return is_numbers and any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation)


def _check_entry(entry: Any, rules: dict[str, _Rule], *, place: str) -> None:
    if not isinstance(entry, dict):
        raise DatasetError(f"{place} must be an object with {', '.join(rules)}, got {_shorten(entry)}")
    if absent := [field for field, rule in rules.items() if rule.is_required and field not in entry]:
        raise DatasetError(f"{place} has no {' and no '.join(absent)}")
    for field, rule in rules.items():
        if field in entry and not rule.holds(entry[field]):
            raise DatasetError(f"{place}: {field} must be {rule.words}, got {_shorten(entry[field])}")


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
