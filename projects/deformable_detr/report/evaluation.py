"""The last evaluation of a run, counted again from its detections and the ground truth by pycocotools.

D detections and T true objects of a whole dataset lie in flat arrays.
"""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.coco_format import check_boxes, read_coco_json
from ..detect.results import RESULTS
from .run import NoData, Run, find_dataset

# Positions of IoU 0.50 and 0.75 among COCO's thresholds 0.50, 0.55, ..., 0.95.
IOU_50, IOU_75 = 0, 5
# In place of an index into the true objects: nothing is there, or only a crowd region, which counts for nothing.
NOTHING, IN_CROWD = -1, -2


@dataclass(frozen=True)
class Matches:
    """A dataset's objects and detections, paired whatever their classes, the surest detection first.

    A detection gets the free object of its image with which it overlaps most, if their IoU is at least 0.5. As stronger
    detections choose first, the pairs above any score threshold are those of a matching of the detections above it.

    Attributes:
        images, classes: (D,) of the detections, by index; images ascend.
        scores: (D,), descending within an image.
        matched: (D,) index of the object of each detection; ``NOTHING`` or ``IN_CROWD`` where it has none.
        true_images, true_classes: (T,) of the objects.
        crowd: (T,) bool, whether an object is a crowd region.
    """

    images: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    matched: np.ndarray
    true_images: np.ndarray
    true_classes: np.ndarray
    crowd: np.ndarray
    num_images: int
    num_classes: int

    def is_correct(self) -> np.ndarray:
        """(D,) whether a detection lies on an object of its class."""
        # An index of no object reads the entry that is added at the end.
        return np.append(self.true_classes, -1)[np.maximum(self.matched, NOTHING)] == self.classes

    def confusion(self, score_threshold: float) -> np.ndarray:
        """Count pairs of classes.

        Returns:
            (K + 1, K + 1): true class by predicted class. The last row is the background: detections where nothing is.
            The last column are missed objects. Crowd regions and detections in them are not counted.
        """
        used = (self.scores >= score_threshold) & (self.matched != IN_CROWD)
        matched = self.matched[used]
        missed = ~self.crowd
        missed[matched[matched >= 0]] = False
        true = np.append(self.true_classes, self.num_classes)[matched]
        rows = np.concatenate([true, self.true_classes[missed]])
        columns = np.concatenate([self.classes[used], np.full(missed.sum(), self.num_classes)])
        size = self.num_classes + 1
        return np.bincount(rows * size + columns, minlength=size * size).reshape(size, size)

    def errors(self, score_threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Count what is wrong in every image.

        Returns:
            Two (num_images,) arrays: objects that no detection of their class lies on; and detections, not in crowd
            regions, that lie on no object of their class. A detection with a wrong class counts in both.
        """
        used = self.scores >= score_threshold
        correct = self.is_correct() & used
        missed = ~self.crowd
        missed[self.matched[correct]] = False
        false = used & ~correct & (self.matched != IN_CROWD)
        return (
            np.bincount(self.true_images[missed], minlength=self.num_images),
            np.bincount(self.images[false], minlength=self.num_images),
        )


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision at recalls 0, 0.01, ..., 1, by COCO's rules, objects of every size, all detections of an image.

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
        classes = ~np.isnan(self.precision[0, 0]) if class_index is None else [class_index]
        precision = self.precision[..., classes].mean(axis=-1)
        return {"IoU .50": precision[IOU_50], "IoU .75": precision[IOU_75], "IoU .50:.95": precision.mean(axis=0)}

    def ap_per_class(self) -> np.ndarray:
        """(K,) AP in percent over all IoU thresholds, the numbers of Detectron2's COCOEvaluator."""
        return 100 * self.precision.mean(axis=(0, 1))


@dataclass(frozen=True)
class BestScore:
    """Where F1 is highest: of the detections with at least this score, at an IoU of 0.5 with objects."""

    score: float
    f1: float
    precision: float
    recall: float


def find_best_score(scores: np.ndarray, correct: np.ndarray, num_objects: int) -> BestScore | None:
    """Find the score from which on detections should be shown.

    Args:
        scores, correct: (D,) of the detections.

    Returns:
        A score midway between the last detection that is shown and the first that is not; None where none is correct.
    """
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(correct[order])
    shown = np.arange(1, len(scores) + 1)
    f1 = 2 * right / (shown + num_objects)
    # Detections of equal scores are shown together.
    f1[:-1][scores[:-1] == scores[1:]] = 0
    if not f1.any():
        return None
    best = f1.argmax()
    hidden = scores[best + 1] if best + 1 < len(scores) else 0.0
    precision, recall = right[best] / shown[best], right[best] / num_objects
    return BestScore(float(scores[best] + hidden) / 2, float(f1[best]), float(precision), float(recall))


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
    truth: Mapping
    detections: list[dict]

    @property
    def class_names(self) -> list[str]:
        """In the order of the contiguous class indices."""
        return list(self.metadata.thing_classes)

    def objects_per_class(self) -> np.ndarray:
        """(K,) number of objects, crowd regions not counted."""
        classes = self.matches.true_classes[~self.matches.crowd]
        return np.bincount(classes, minlength=self.matches.num_classes)

    @cached_property
    def matches(self) -> Matches:
        """Pairs by COCO's own matching at IoU 0.50, without regard to classes, sizes and the number of detections."""
        objects = self.truth["annotations"]
        evaluator = self._coco_eval()
        evaluator.params.useCats = 0
        evaluator.params.iouThrs = np.array([0.5])
        _silently(evaluator.evaluate)
        image_index = {image["image_id"]: index for index, image in enumerate(self.dicts)}
        class_index = self.metadata.thing_dataset_id_to_contiguous_id
        by_image = sorted(filter(None, evaluator.evalImgs), key=lambda result: image_index[result["image_id"]])
        found = [self.detections[number - 1] for result in by_image for number in result["dtIds"]]
        numbers = np.concatenate([np.zeros(0), *(result["dtMatches"][0] for result in by_image)]).astype(np.int64)
        ignored = np.concatenate([np.zeros(0), *(result["dtIgnore"][0] for result in by_image)]).astype(bool)
        return Matches(
            images=_indices(found, "image_id", image_index),
            classes=_indices(found, "category_id", class_index),
            scores=np.array([entry["score"] for entry in found], dtype=np.float64),
            matched=np.where(ignored, IN_CROWD, numbers - 1),
            true_images=_indices(objects, "image_id", image_index),
            true_classes=_indices(objects, "category_id", class_index),
            crowd=np.array([entry.get("iscrowd", 0) for entry in objects], dtype=bool),
            num_images=len(self.dicts),
            num_classes=len(self.class_names),
        )

    def precision_recall(self) -> PrecisionRecall:
        """COCO's evaluation.

        Raises:
            NoData: there is no detection, or no object.
        """
        if not self.detections:
            raise NoData("The last evaluation detected nothing at all.")
        if not self.objects_per_class().any():
            raise NoData(f"The dataset {self.name} has no object.")
        # (IoU, recall, class, size, limit of detections); -1 where a class has no object.
        precision = self._by_category.eval["precision"][:, :, :, 0, -1]
        return PrecisionRecall(np.where(precision < 0, np.nan, precision))

    def best_scores(self) -> tuple[BestScore | None, list[BestScore | None]]:
        """Return the scores with the best F1: over all categories together, and of each of the K categories."""
        found: list[list] = [[(np.empty(0), np.empty(0, dtype=bool))] for _ in self.class_names]
        class_index = self.metadata.thing_dataset_id_to_contiguous_id
        for result in filter(None, self._by_category.evalImgs):
            counts = ~result["dtIgnore"][IOU_50]
            scores = np.asarray(result["dtScores"])[counts]
            found[class_index[result["category_id"]]].append((scores, result["dtMatches"][IOU_50][counts] > 0))
        by_class = [tuple(map(np.concatenate, zip(*parts, strict=True))) for parts in found]
        objects = self.objects_per_class()
        best = [find_best_score(*own, int(number)) for own, number in zip(by_class, objects, strict=True)]
        together = map(np.concatenate, zip(*by_class, strict=True))
        return find_best_score(*together, int(objects.sum())), best

    @cached_property
    def _by_category(self) -> COCOeval:
        evaluator = self._coco_eval()
        _silently(evaluator.evaluate)
        _silently(evaluator.accumulate)
        return evaluator

    def _coco_eval(self) -> COCOeval:
        """Return an evaluation of objects of every size; of COCO's four ranges, this is the only one that is shown.

        It counts all detections of an image, as that of the run did: beyond COCO's 100 where the model returns more.
        """
        truth, found = COCO(), COCO()
        # pycocotools writes into the entries that it is given. It tells a match by the id of its annotation, with 0
        # for none: whatever the file says, they count from 1.
        objects = [
            {"iscrowd": 0, "area": 0, **entry, "id": number}
            for number, entry in enumerate(self.truth["annotations"], start=1)
        ]
        truth.dataset = {**self.truth, "annotations": objects}
        entries = [
            {**entry, "id": number, "area": entry["bbox"][2] * entry["bbox"][3]}
            for number, entry in enumerate(self.detections, start=1)
        ]
        found.dataset = {**self.truth, "annotations": entries}
        _silently(truth.createIndex)
        _silently(found.createIndex)
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, np.inf]], ["all"]
        evaluator.params.maxDets = [max(len(self.detections), 1)]
        return evaluator


def load_evaluation(run: Run, dataset_name: str | None = None) -> Evaluation:
    """Read what a run detected last, and the ground truth.

    Args:
        dataset_name: a registered dataset; default: that of the run's configuration.

    Raises:
        NoData: there was no evaluation yet, or its data cannot be had.
    """
    detections = _read_detections(run.folder / RESULTS)
    name = find_dataset(run) if dataset_name is None else dataset_name
    dicts, metadata, truth = _load_dataset(name)
    known = {
        "image_id": {image["image_id"] for image in dicts},
        "category_id": metadata.thing_dataset_id_to_contiguous_id,
    }
    for key, values in known.items():
        unknown = next((detection[key] for detection in detections if detection[key] not in values), None)
        if unknown is not None:
            raise NoData(
                f"{run.folder / RESULTS} is not about the dataset {name}: {metadata.json_file} has no {key} {unknown}."
            )
    return Evaluation(name, metadata, dicts, truth, detections)


def _read_detections(path: Path) -> list[dict]:
    if not path.is_file():
        raise NoData(f"No evaluation has ended yet, or it was not on data in COCO's format: there is no {path}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise NoData(f"{path} is not complete: an evaluation is writing it, or was interrupted.") from None


def _load_dataset(name: str) -> tuple[list[dict], Metadata, dict]:
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
    try:
        truth = read_coco_json(metadata.json_file)
        # An object of no image is in none of them, as in the evaluation of the run.
        images = {image["id"] for image in truth["images"]}
        truth["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] in images]
        check_boxes(truth["annotations"], metadata.json_file)
        # Loading fills in the metadata that maps the category ids.
        dicts = DatasetCatalog.get(name)
    # Detectron2's loader has assertions for ids, and a KeyError for an unknown category.
    except (ValueError, KeyError, AssertionError) as error:
        told = str(error.args[0]) if error.args else type(error).__name__
        raise NoData(f"The ground truth of {name} in {metadata.json_file} cannot be used: {told}") from error
    return dicts, metadata, truth


def _indices(entries: Sequence[Mapping], key: str, index: Mapping[object, int]) -> np.ndarray:
    return np.array([index[entry[key]] for entry in entries], dtype=np.int64)


def _silently(call) -> None:
    """pycocotools reports with print."""
    with contextlib.redirect_stdout(io.StringIO()):
        call()
