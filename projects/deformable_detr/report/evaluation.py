"""The last evaluation of a run, counted again from its detections and the ground truth."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from pycocotools.coco import COCO

from .matching import BoxTable, Matches, match_detections
from .run import RESULTS, NoData, Run, find_dataset

# Positions of IoU 0.50 and 0.75 among COCO's thresholds 0.50, 0.55, ..., 0.95.
IOU_50, IOU_75 = 0, 5


@dataclass(frozen=True)
class Evaluation:
    """Ground truth and detections of a dataset in COCO's format.

    Attributes:
        dicts: the images in Detectron2's format.
        detections: in the COCO results format.
    """

    name: str
    metadata: Metadata
    dicts: list[dict]
    coco: COCO
    detections: list[dict]
    matches: Matches

    @property
    def class_names(self) -> list[str]:
        """In the order of the contiguous class indices."""
        return list(self.metadata.thing_classes)

    def objects_per_class(self) -> np.ndarray:
        """(K,) number of objects, crowd regions not counted."""
        truth = self.matches.truth
        return np.bincount(truth.classes[~truth.crowd], minlength=self.matches.num_classes)


def load_evaluation(run: Run, dataset_name: str | None = None) -> Evaluation:
    """Read what a run detected last, and match it with the ground truth.

    Args:
        dataset_name: a registered dataset; default: that of the run's configuration.

    Raises:
        NoData: there was no evaluation yet, or its data cannot be had.
    """
    detections = _read_detections(run.folder / RESULTS)
    name = find_dataset(run) if dataset_name is None else dataset_name
    dicts, metadata = _load_dataset(name)
    with _silent():
        coco = COCO(metadata.json_file)
    image_index = {image["image_id"]: index for index, image in enumerate(dicts)}
    class_index = metadata.thing_dataset_id_to_contiguous_id
    for key, known in (("image_id", image_index), ("category_id", class_index)):
        unknown = next((detection[key] for detection in detections if detection[key] not in known), None)
        if unknown is not None:
            raise NoData(
                f"{run.folder / RESULTS} is not about the dataset {name}: {metadata.json_file} has no {key} {unknown}."
            )
    indices = {"image_index": image_index, "class_index": class_index}
    truth = BoxTable.from_coco(coco.dataset["annotations"], **indices)
    found = BoxTable.from_coco(detections, **indices)
    matched = match_detections(truth, found, len(dicts))
    matches = Matches(truth, found, matched, num_images=len(dicts), num_classes=len(metadata.thing_classes))
    return Evaluation(name, metadata, dicts, coco, detections, matches)


def _read_detections(path: Path) -> list[dict]:
    if not path.is_file():
        raise NoData(f"No evaluation has ended yet, or it was not on data in COCO's format: there is no {path}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise NoData(f"{path} is not complete: an evaluation is writing it, or was interrupted.") from None


def _load_dataset(name: str) -> tuple[list[dict], Metadata]:
    if name not in DatasetCatalog:
        raise NoData(f"The dataset {name} is not registered here; give --val-json and --val-images.")
    metadata = MetadataCatalog.get(name)
    if not hasattr(metadata, "json_file") or metadata.get("evaluator_type") == "lvis":
        raise NoData(f"The dataset {name} is not in COCO's format, the one that can be evaluated here.")
    if not Path(metadata.json_file).is_file():
        raise NoData(
            f"There is no {metadata.json_file}, the ground truth of {name}: set DETECTRON2_DATASETS to the folder "
            f"above it, or give --val-json and --val-images."
        )
    # Loading fills in the metadata that maps the category ids.
    return DatasetCatalog.get(name), metadata


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision at recalls 0, 0.01, ..., 1, by COCO's rules, objects of every size, at most 100 detections an image.

    Attributes:
        precision: (10 IoU thresholds 0.50, ..., 0.95; 101 recalls; K classes); NaN in classes without objects.
    """

    precision: np.ndarray

    @property
    def recall(self) -> np.ndarray:
        """(101,) the recalls."""
        return np.linspace(0, 1, self.precision.shape[1])

    def curves(self, class_index: int | None = None) -> dict[str, np.ndarray]:
        """(101,) precision at IoU .50, at .75, and their mean over all thresholds.

        Args:
            class_index: one class; None averages over the classes that have objects.
        """
        by_class = self.precision[..., class_index] if class_index is not None else _mean_over_classes(self.precision)
        return {"IoU .50": by_class[IOU_50], "IoU .75": by_class[IOU_75], "IoU .50:.95": by_class.mean(axis=0)}

    def ap_per_class(self) -> np.ndarray:
        """(K,) AP in percent over all IoU thresholds, the numbers of Detectron2's COCOEvaluator."""
        return 100 * self.precision.mean(axis=(0, 1))


def _mean_over_classes(precision: np.ndarray) -> np.ndarray:
    return precision[..., ~np.isnan(precision[0, 0])].mean(axis=-1)


def precision_recall(evaluation: Evaluation) -> PrecisionRecall:
    """Run pycocotools' evaluation for objects of every size.

    Raises:
        NoData: there is no detection, or no object.
    """
    if not evaluation.detections:
        raise NoData("The last evaluation detected nothing at all.")
    if not evaluation.objects_per_class().any():
        raise NoData(f"The dataset {evaluation.name} has no object.")
    with _silent():
        # loadRes writes into the entries that it is given.
        found = evaluation.coco.loadRes([dict(detection) for detection in evaluation.detections])
        evaluator = COCOeval_opt(evaluation.coco, found, "bbox")
        # Three of COCO's four ranges of sizes are not asked for here, and most of the time would go into them.
        evaluator.params.areaRng, evaluator.params.areaRngLbl = evaluator.params.areaRng[:1], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    # (IoU, recall, class, size, limit of detections); -1 where a class has no object.
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    return PrecisionRecall(np.where(precision < 0, np.nan, precision))


def _silent() -> contextlib.AbstractContextManager:
    """pycocotools reports with print."""
    return contextlib.redirect_stdout(io.StringIO())
