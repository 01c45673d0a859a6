"""Checked datasets, and the user's own COCO-format files."""

import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import BoxMode
from omegaconf import DictConfig

from ..config import RunConfig
from ..wording import ignoring_records, name_first
from .classes import check_num_classes
from .coco_format import DatasetError, read_coco_json
from .dataset_dict import describe_image, get_objects

logger = logging.getLogger(__name__)

_MAX_NAMED = 10
# In the output folder of a training: split -> annotation file and image folder of the user's data.
USER_DATA = "user_data.json"


def check_dataset_files(names: Sequence[str]) -> None:
    """Check that the annotations of registered datasets are there, without reading them.

    Raises:
        KeyError: if there is no dataset of that name.
        FileNotFoundError: if a file or folder that Detectron2 knows of is missing.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise KeyError(f"dataset {name!r} is not registered; registered are {sorted(DatasetCatalog)}")
        metadata = MetadataCatalog.get(name)
        # Of COCO and LVIS the annotation file, of Pascal VOC the folder.
        path = metadata.get("json_file", None) or metadata.get("dirname", None)
        if path and "://" not in path and not os.path.exists(path):
            root = os.environ.get("DETECTRON2_DATASETS", "datasets, as it is not set")
            raise FileNotFoundError(
                f"dataset {name!r} needs {path}, which does not exist. Detectron2's own datasets are expected below "
                f"DETECTRON2_DATASETS ({root}); your own are given with --train-json, --train-images, --val-json and "
                "--val-images"
            )


def get_class_names(cfg: CfgNode | DictConfig) -> list[str] | None:
    """Names of the model's outputs, by the dataset they are for; None where there is no such dataset."""
    run = RunConfig(cfg)
    datasets = [*run.get("train_datasets", ()), *run.get("test_datasets", ())]
    names = MetadataCatalog.get(datasets[0]).get("thing_classes", None) if datasets else None
    # A model with 91 outputs can be evaluated on COCO's 80 classes: those are not its outputs' names.
    return list(names) if names is not None and len(names) == run.get("num_classes") else None


def get_train_dicts(
    names: str | Sequence[str], *, num_classes: int, num_queries: int | None = None, filter_empty: bool = False
) -> list[dict]:
    """Load training datasets and check every annotation before the first step.

    Args:
        names: registered datasets.
        num_classes: class outputs of the model.
        num_queries: detections of the model; images with more objects are counted in a warning.
        filter_empty: drop images without objects; the official recipe keeps them.

    Raises:
        KeyError: if a dataset is not registered.
        ValueError: without a dataset, without an object that is not a crowd, on another number of classes than
            ``num_classes``, on classes outside ``[0, num_classes)``, on boxes with NaN or infinite values.
    """
    if not names:
        raise ValueError("there is no dataset to train on: no names are given")
    dicts = get_detection_dataset_dicts(names, filter_empty=False)
    kept = [record for record in dicts if get_objects(record)]
    if not kept:
        raise ValueError(
            f"there is nothing to learn: none of the {len(dicts)} images of {names} has an object that is not a crowd"
        )
    if filter_empty:
        logger.info(f"{len(dicts) - len(kept)} of {len(dicts)} training images have no objects and are left out")
        dicts = kept
    check_annotations(dicts, num_classes=num_classes)
    check_num_classes([names] if isinstance(names, str) else names, num_classes)
    objects = sum(len(get_objects(record)) for record in dicts)
    logger.info(
        f"Annotations checked: {len(dicts)} images with {objects} objects of {num_classes} classes to train on, "
        f"{len(dicts) - len(kept)} images without objects"
    )
    _warn_of_empty_classes(dicts, names if isinstance(names, str) else names[0])
    if num_queries is not None:
        _warn_of_crowded_images(
            dicts,
            num_queries,
            f"training images have more objects than the model has queries ({num_queries}): what is left over is not "
            "learned. Raise NUM_QUERIES",
        )
    return dicts


def get_test_dicts(
    names: str | Sequence[str], *, max_detections: int | None = None, filter_empty: bool = False
) -> list[dict]:
    """Load datasets to evaluate on.

    Args:
        names: registered datasets.
        max_detections: that the model returns for an image; images with more objects are counted in a warning.
        filter_empty: drop images without objects; the standard figures need them.
    """
    dicts = get_detection_dataset_dicts(names, filter_empty=filter_empty)
    if max_detections is not None:
        _warn_of_crowded_images(
            dicts,
            max_detections,
            f"images of {names} have more objects than the model returns detections ({max_detections}): what is left "
            "over counts as missed. Raise TEST.DETECTIONS_PER_IMAGE (in a LazyConfig model.test_topk_per_image)",
        )
    return dicts


def _warn_of_empty_classes(dicts: Sequence[dict], name: str) -> None:
    classes = MetadataCatalog.get(name).get("thing_classes", None) or ()
    seen = {annotation["category_id"] for record in dicts for annotation in get_objects(record)}
    if empty := [name for index, name in enumerate(classes) if index not in seen]:
        logger.warning(
            f"{len(empty)} of {len(classes)} classes have no object in the training data and are not learned: "
            f"{name_first(empty, limit=_MAX_NAMED)}"
        )


def _warn_of_crowded_images(dicts: Sequence[dict], limit: int, what: str) -> None:
    """Say of how many images something holds, and which is the worst."""
    crowded = [record for record in dicts if len(get_objects(record)) > limit]
    if crowded:
        most = max(crowded, key=lambda record: len(get_objects(record)))
        worst = f"The most are {len(get_objects(most))} in {describe_image(most)}"
        logger.warning(f"{len(crowded)} of {len(dicts)} {what}. {worst}")


def check_annotations(dicts: Sequence[dict], *, num_classes: int) -> None:
    """Refuse annotations that cannot be trained on; report boxes without area, which the mapper drops.

    Raises:
        ValueError: on classes outside ``[0, num_classes)``, on boxes with NaN or infinite values.
    """
    without_area = []
    for record in dicts:
        for annotation in record.get("annotations", ()):
            label, box = annotation["category_id"], annotation["bbox"]
            if not 0 <= label < num_classes:
                raise ValueError(
                    f"category_id must be in [0, {num_classes}) (NUM_CLASSES of the model), got {label} "
                    f"in {describe_image(record)}"
                )
            if not all(math.isfinite(value) for value in box):
                raise ValueError(f"bbox must be finite, got {list(box)} in {describe_image(record)}")
            if not _has_area(box, annotation["bbox_mode"]):
                without_area.append((record, box))
    if without_area:
        record, box = without_area[0]
        logger.warning(
            f"{len(without_area)} boxes without area are left out of training; the first is {list(box)} "
            f"in {describe_image(record)}"
        )


def _has_area(box: Sequence[float], mode: BoxMode) -> bool:
    # BoxMode.convert takes 20 us for a list: minutes of a large dataset.
    if mode == BoxMode.XYWH_ABS:
        _, _, width, height = box
        return width > 0 and height > 0
    x0, y0, x1, y1 = box if mode == BoxMode.XYXY_ABS else BoxMode.convert(list(box), mode, BoxMode.XYXY_ABS)
    return x1 > x0 and y1 > y0


def register_coco_data(
    name: str, json_file: str, image_root: str, *, content: dict | None = None, boxes_only: bool = True
) -> list[str]:
    """Register the user's COCO-format detection data, replacing an earlier registration of the same name.

    Args:
        name: the dataset name for ``DATASETS``.
        json_file: annotations in COCO's "instances" format.
        image_root: folder of the images.
        content: of the file, where :func:`read_coco_json` has read it already.
        boxes_only: load neither segmentations nor keypoints, which Detectron2's loader drops objects for, or dies of.

    Returns:
        Class names, in the order of the model's outputs (ascending COCO category id).

    Raises:
        FileNotFoundError: if the file or the folder does not exist.
        DatasetError: if the file is not in COCO's format; when it is loaded, if an object is marked "ignore".
    """
    content = read_coco_json(json_file) if content is None else content
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"there is no image folder {image_root!r} for dataset {name!r}")
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    classes = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    register_coco_instances(name, {"thing_classes": classes}, json_file, image_root)
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, partial(_load, name, json_file, image_root, boxes_only=boxes_only))
    return classes


def read_user_data(folder: str | os.PathLike) -> dict[str, tuple[str, str]]:
    """Return the user's data that an output folder has recorded of its training.

    Returns:
        Split -> annotation file and image folder; nothing where there is no record.
    """
    path = os.path.join(folder, USER_DATA)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return {split: tuple(paths) for split, paths in json.load(file).items()}


def _load(name: str, json_file: str, image_root: str, *, boxes_only: bool) -> list[dict]:
    """Detectron2's loader, with boxes only on a copy of the file without segmentations and keypoints."""
    content = read_coco_json(json_file)
    # Detectron2 has a bare assertion for these. The check of the data finds them all, before anything is loaded.
    if ignored := next((a for a in content["annotations"] if a.get("ignore")), None):
        raise DatasetError(
            f'{json_file}: annotation {ignored.get("id")} has "ignore": {ignored["ignore"]}, which Detectron2 does not '
            'support: set "iscrowd": 1 in its place, as --repair of train_net.py does'
        )
    # Ids of any kind are mapped, as everywhere; and the file that is loaded may be a copy.
    with ignoring_records("detectron2.data.datasets.coco", "Category ids in annotations are not in", "Loaded "):
        load = partial(_load_boxes, content) if boxes_only else partial(load_coco_json, json_file)
        dicts = load(image_root, name)
    logger.info(f"Loaded {len(dicts)} images of {json_file}")
    return dicts


def _load_boxes(content: dict, image_root: str, name: str) -> list[dict]:
    for annotation in content["annotations"]:
        for key in ("segmentation", "keypoints"):
            annotation.pop(key, None)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "boxes.json")
        with open(path, "w", encoding="utf-8") as file:
            # dumps is many times as fast as dump.
            file.write(json.dumps(content))
        return load_coco_json(path, image_root, name)
