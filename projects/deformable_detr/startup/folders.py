"""Folders of YOLO's and Pascal VOC's kind, made into COCO's format by the library ``supervision``."""

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..data.coco_format import DatasetError, read_coco_json
from ..files import replacing_file, write_json

# Where a folder's splits are, by the names that are in use.
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_XML_POLYGON = re.compile(rb"<polygon\b[^>]*(?<!/)>.*?</polygon\s*>", re.DOTALL)


class Folder(NamedTuple):
    """A split of a dataset in folders.

    Attributes:
        labels: folder of the texts or XML files.
        images: folder of the images.
        data_yaml: with the classes of YOLO's texts; None for Pascal VOC.
    """

    labels: Path
    images: Path
    data_yaml: Path | None = None


def find_folders(data: str) -> dict[str, Folder]:
    """Return the splits of ``--data``: a ``data.yaml``, its folder, or a folder with Pascal VOC's files.

    Raises:
        FileNotFoundError: if it is neither, or a folder that it names is missing.
        DatasetError: on a ``data.yaml`` that names no folders.
    """
    path = Path(data)
    if (path / "data.yaml").is_file():
        path /= "data.yaml"
    found = _yolo_splits(path) if path.suffix in (".yaml", ".yml") else _voc_splits(path)
    if not found:
        raise FileNotFoundError(
            f"--data must be a data.yaml of YOLO's format, its folder, or a folder with train and val folders (or "
            f"Annotations, JPEGImages and ImageSets) of Pascal VOC's format; {data} is none of them"
        )
    return found


def find_folder(split: str, annotations: str, images: str | None) -> Folder | None:
    """Return what ``--train-json`` and ``--train-images`` (or those of "val") mean; None for a file in COCO format."""
    path = Path(annotations)
    if path.suffix in (".yaml", ".yml") or (path / "data.yaml").is_file():
        found = find_folders(annotations)
        if split not in found:
            raise DatasetError(f"{annotations} names no images for --{split}-json")
        return found[split] if images is None else found[split]._replace(images=Path(images))
    return Folder(path, Path(images or path)) if path.is_dir() else None


def convert_folders(folders: dict[str, Folder], output_dir: str) -> dict[str, tuple[str, str]]:
    """Write the annotations of every split in COCO's format into the output folder.

    The categories of all splits are the same: those of ``data.yaml``, or all that occur in Pascal VOC's files. Of
    polygons their boxes are kept.

    Returns:
        Split -> annotation file and image folder.

    Raises:
        ModuleNotFoundError: without the package supervision.
        DatasetError: on files that it cannot read, on images that it would leave out, on names in a list that no image
            has, and on two classes of one name; repairs come after that.
    """
    os.makedirs(output_dir, exist_ok=True)
    files = {split: os.path.join(output_dir, f"{split}_coco.json") for split in folders}
    for split, folder in folders.items():
        _convert(folder, files[split])
    contents = {split: read_coco_json(path) for split, path in files.items()}
    share_categories(list(contents.values()))
    for split, folder in folders.items():
        if wanted := _names_in_list(folder.labels.parent, split):
            _keep_images(contents[split], wanted, folder=folder.images, listed=_list_of(folder.labels.parent, split))
        number_by_name(contents[split])
        for annotation in contents[split]["annotations"]:
            annotation["iscrowd"] = 0  # Neither format has crowds; supervision takes objects of several parts for them.
        write_json(files[split], contents[split])
    return {split: (files[split], os.fspath(folder.images)) for split, folder in folders.items()}


def share_categories(contents: list[dict[str, Any]]) -> None:
    """Give files in COCO's format, whose categories may differ, all of these, in the order in which they appear."""
    names = list(dict.fromkeys(c["name"] for content in contents for c in _by_id(content["categories"])))
    ids = {name: index + 1 for index, name in enumerate(names)}
    for content in contents:
        own = {category["id"]: category["name"] for category in content["categories"]}
        for annotation in content["annotations"]:
            annotation["category_id"] = ids[own[annotation["category_id"]]]
        content["categories"] = [{"id": ids[name], "name": name} for name in names]


def number_by_name(content: dict[str, Any]) -> None:
    """Number images in COCO's format from 1 in the order of their names, and objects in that of the images.

    YOLO's come in the order of the disk, on which neither a training nor the ids of detections may depend.
    """
    images = sorted(content["images"], key=lambda image: image["file_name"])
    ids = {image["id"]: number for number, image in enumerate(images, start=1)}
    objects = sorted(content["annotations"], key=lambda annotation: (ids[annotation["image_id"]], annotation["id"]))
    content["images"] = [{**image, "id": ids[image["id"]]} for image in images]
    content["annotations"] = [
        {**annotation, "id": number, "image_id": ids[annotation["image_id"]]}
        for number, annotation in enumerate(objects, start=1)
    ]


def _by_id(categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(categories, key=lambda category: category["id"])


def _convert(folder: Folder, path: str) -> None:
    dataset = _import_supervision().DetectionDataset
    for part in folder[:2]:
        if not part.is_dir():
            raise FileNotFoundError(f"there is no folder {part}")
    _check_no_image_below(folder.images)
    if folder.data_yaml is None:
        read: Callable = dataset.from_pascal_voc
    else:
        read = partial(dataset.from_yolo, data_yaml_path=str(folder.data_yaml))
    with tempfile.TemporaryDirectory() as temporary:
        labels = _without_polygons(folder, Path(temporary))
        try:
            data = read(images_directory_path=str(folder.images), annotations_directory_path=str(labels))
            if not len(data):
                raise ValueError(f"{folder.images} has no image")
            with replacing_file(path) as unfinished:
                data.as_coco(annotations_path=str(unfinished))
        # SyntaxError is that of XML.
        except (ValueError, SyntaxError, KeyError, IndexError) as error:
            told = str(error).replace(str(labels), str(folder.labels))
            raise DatasetError(f"supervision cannot read {folder.labels}: {told}") from error
    if twice := [name for name, number in Counter(data.classes).items() if number > 1]:
        raise DatasetError(f"{folder.data_yaml}: every class must have a name of its own; names has {twice} repeatedly")


def _without_polygons(folder: Folder, temporary: Path) -> Path:
    """Return a folder of labels with boxes alone: that of the data where it has no others, or else copies.

    Of polygons supervision keeps masks as large as the image, those of all objects at once.
    """
    suffix, boxes_of = ("xml", partial(_XML_POLYGON.sub, b"")) if folder.data_yaml is None else ("txt", _boxes)
    # supervision knows the rows of key points by their length, and leaves the points out.
    if folder.data_yaml is not None and "kpt_shape" in yaml.safe_load(folder.data_yaml.read_text(encoding="utf-8")):
        return folder.labels
    changed, others = {}, []
    for path in folder.labels.glob(f"*.{suffix}"):
        text = path.read_bytes()
        if (boxes := boxes_of(text)) != text:
            changed[path.name] = boxes
        else:
            others.append(path)
    if not changed:
        return folder.labels
    for name, boxes in changed.items():
        (temporary / name).write_bytes(boxes)
    for path in others:
        shutil.copyfile(path, temporary / path.name)
    return temporary


def _boxes(text: bytes) -> bytes:
    """Put their boxes in place of polygons in YOLO's labels: of lines with a class and at least three pairs."""
    return b"".join(_box(line) if len(line.split()) > 6 else line for line in text.splitlines(keepends=True))


def _box(line: bytes) -> bytes:
    label, *values = line.split()
    try:
        # Behind the pairs there may be a confidence.
        x, y = ([float(value) for value in values[axis : len(values) // 2 * 2 : 2]] for axis in (0, 1))
    except ValueError:
        return line  # supervision names it, with its file.
    x0, y0, x1, y1 = min(x), min(y), max(x), max(y)
    return b"%s %r %r %r %r\n" % (label, (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)


def _check_no_image_below(folder: Path) -> None:
    """Refuse images in deeper folders: supervision lists this one alone, and leaves them out without a word."""
    found = (path.relative_to(folder) for path in folder.glob("*/**/*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    below = sorted(path for path in found if not any(part.startswith(".") for part in path.parts))
    if below:
        raise DatasetError(
            f"all images of a split must lie in one folder; {folder} has {len(below)} in folders below it, such as "
            f"{below[0]}"
        )


def _import_supervision() -> Any:
    try:
        import supervision
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "YOLO's and Pascal VOC's folders need the package supervision: pip install supervision"
        ) from error
    return supervision


def _yolo_splits(data_yaml: Path) -> dict[str, Folder]:
    """Return the folders that a ``data.yaml`` names; labels are where images are, with "labels" for "images"."""
    if not data_yaml.is_file():
        raise FileNotFoundError(f"there is no {data_yaml}")
    try:
        content = yaml.safe_load(data_yaml.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise DatasetError(f"{data_yaml} must be YAML: {error}") from error
    entries = {split: content.get(split) for split in _SPLITS} if isinstance(content, dict) else {}
    found = {}
    for split, entry in entries.items():
        if entry is None:
            continue
        if not isinstance(entry, str) or entry.endswith(".txt"):
            raise DatasetError(f"{data_yaml}: {split} must be one folder of images, got {entry!r}")
        images = _find(data_yaml, content.get("path") or "", entry)
        found[split] = Folder(_labels_of(images), images, data_yaml)
    if not found:
        raise DatasetError(f"{data_yaml} must name folders of images under train and val")
    return found


def _find(data_yaml: Path, root: str, entry: str) -> Path:
    """Return the folder that is meant: below ``path``, or below the file, where Roboflow's "../train" is, too."""
    below = data_yaml.parent
    candidates = [below / root / entry, below / entry, below / entry.removeprefix("../")]
    return next((path for path in candidates if path.is_dir()), candidates[0])


def _labels_of(images: Path) -> Path:
    """Return where labels are: "labels" in place of the last "images" of the path, or beside the images."""
    parts = images.parts
    if "images" not in parts:
        return images
    last = len(parts) - 1 - parts[::-1].index("images")
    return Path(*parts[:last], "labels", *parts[last + 1 :])


def _voc_splits(folder: Path) -> dict[str, Folder]:
    """Return a devkit's folders (one for all splits, which ``ImageSets`` lists), or those of an export by splits."""
    if (folder / "Annotations").is_dir():
        whole = Folder(folder / "Annotations", folder / "JPEGImages")
        return {split: whole for split in _SPLITS if _names_in_list(folder, split)}
    found = {}
    for split, names in _SPLITS.items():
        if path := next((folder / name for name in names if any((folder / name).glob("*.xml"))), None):
            found[split] = Folder(path, path)
    return found


def _list_of(folder: Path, split: str) -> Path:
    """Return where a Pascal VOC devkit lists the images of a split."""
    return folder / "ImageSets" / "Main" / f"{split}.txt"


def _names_in_list(folder: Path, split: str) -> list[str]:
    """Return the images of a devkit's list, one a line, without suffix; none where there is no list."""
    path = _list_of(folder, split)
    lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
    return [name for line in lines if (name := line.strip())]


def _keep_images(content: dict[str, Any], names: list[str], *, folder: Path, listed: Path) -> None:
    """Leave out the images that are not listed.

    Raises:
        DatasetError: if the list names an image that is not there.
    """
    present = {Path(image["file_name"]).stem for image in content["images"]}
    if missing := [name for name in names if name not in present]:
        examples = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise DatasetError(
            f"every line of {listed} must be the name of an image in {folder} without its suffix; {len(missing)} of "
            f"{len(names)} are none: {examples}"
        )
    wanted = set(names)
    content["images"] = [image for image in content["images"] if Path(image["file_name"]).stem in wanted]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
