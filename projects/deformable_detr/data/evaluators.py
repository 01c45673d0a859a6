"""Detectron2's evaluator for a dataset, or why there is none."""

import contextlib
import importlib
import io

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator
from pycocotools.coco import COCO

# COCO's panoptic datasets carry boxes in the same format as its detection datasets.
EVALUATOR_TYPES = ("coco", "coco_panoptic_seg", "lvis", "pascal_voc")
# Detections of an image that the standard figures count.
_COCO_DETECTIONS = 100
_LVIS_DETECTIONS = 300


def check_evaluator(dataset_name: str) -> str:
    """Check that a dataset can be evaluated, without reading it.

    Returns:
        Its ``evaluator_type``.

    Raises:
        KeyError: if the dataset is not registered.
        NotImplementedError: on another type than COCO, LVIS and Pascal VOC, or a dataset without one.
        ModuleNotFoundError: if the evaluator needs a package that is not installed.
    """
    if dataset_name not in DatasetCatalog:
        raise KeyError(f"dataset {dataset_name!r} is not registered; registered are {sorted(DatasetCatalog.list())}")
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if evaluator_type not in EVALUATOR_TYPES:
        raise NotImplementedError(
            f"dataset {dataset_name!r} has evaluator_type {evaluator_type!r}; supported are {EVALUATOR_TYPES}"
        )
    if evaluator_type == "lvis":
        try:
            importlib.import_module("lvis")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"evaluating dataset {dataset_name!r} needs the package {error.name!r}: pip install {error.name}"
            ) from error
    return evaluator_type


def build_evaluator(
    dataset_name: str, output_dir: str | None = None, *, max_detections: int | None = None
) -> DatasetEvaluator:
    """Build the evaluator for a dataset's ``evaluator_type``: COCO, LVIS or Pascal VOC.

    Args:
        dataset_name: a registered dataset.
        output_dir: where detections are written, if anywhere.
        max_detections: that the model returns for an image. All of them count, also where the standard figures stop:
            after 100 (COCO) and 300 (LVIS).

    Raises:
        What :func:`check_evaluator` does.
    """
    evaluator_type = check_evaluator(dataset_name)
    if evaluator_type == "lvis":
        limit = _limit_beyond(_LVIS_DETECTIONS, max_detections)
        return LVISEvaluator(dataset_name, tasks=("bbox",), output_dir=output_dir, max_dets_per_image=limit)
    if evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    limit = _limit_beyond(_COCO_DETECTIONS, max_detections)
    evaluator = COCOEvaluator(dataset_name, tasks=("bbox",), output_dir=output_dir, max_dets_per_image=limit)
    _number_objects_from_one(evaluator._coco_api)
    return evaluator


def _number_objects_from_one(truth: COCO) -> None:
    """pycocotools marks a detection with the id of the object that it matches, and 0 means none."""
    if 0 not in truth.anns:
        return
    for number, annotation in enumerate(truth.dataset["annotations"], start=1):
        annotation["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()


def _limit_beyond(standard: int, max_detections: int | None) -> int | None:
    """Return the limit to set; None for the standard one."""
    return max_detections if max_detections is not None and max_detections > standard else None
