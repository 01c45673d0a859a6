"""Which detection found which object: one matching from which confusion, scores and errors are counted.

D detections and T true objects of a whole dataset lie in flat arrays; boxes are (x, y, width, height) in pixels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

IOU_THRESHOLD = 0.5
# In place of an index into the true objects: nothing is there, or only a crowd region, which counts for nothing.
NOTHING, IN_CROWD = -1, -2


@dataclass(frozen=True)
class BoxTable:
    """Boxes of a dataset, image by image.

    Attributes:
        images: (B,) index of each box's image, ascending.
        classes: (B,) contiguous class indices.
        boxes: (B, 4) xywh in pixels.
        crowd: (B,) bool, whether a true box is a crowd region.
        scores: (B,) of detections, descending within an image.
    """

    images: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    scores: np.ndarray

    @classmethod
    def from_coco(
        cls, entries: Iterable[Mapping], *, image_index: Mapping[object, int], class_index: Mapping[int, int]
    ) -> "BoxTable":
        """Reads annotations or results in COCO's format.

        Args:
            image_index: COCO image id -> position of the image.
            class_index: COCO category id -> contiguous class index.
        """
        entries = list(entries)
        images = np.array([image_index[entry["image_id"]] for entry in entries], dtype=np.int64)
        scores = np.array([entry.get("score", 1.0) for entry in entries], dtype=np.float64)
        order = np.lexsort((-scores, images))
        return cls(
            images=images[order],
            classes=np.array([class_index[entry["category_id"]] for entry in entries], dtype=np.int64)[order],
            boxes=np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)[order],
            crowd=np.array([entry.get("iscrowd", 0) for entry in entries], dtype=bool)[order],
            scores=scores[order],
        )

    def bounds(self, num_images: int) -> np.ndarray:
        """(num_images + 1,) where each image's boxes begin, and the last one's end."""
        return np.searchsorted(self.images, np.arange(num_images + 1))


def match_detections(truth: BoxTable, found: BoxTable, num_images: int) -> np.ndarray:
    """Pairs detections with objects, whatever their classes, the surest detection first.

    A detection gets the free object of its image with which it overlaps most, if their IoU is at least 0.5. As stronger
    detections choose first, the pairs above any score threshold are those of a matching of the detections above it.

    Returns:
        (D,) index of the object of each detection; ``NOTHING`` or ``IN_CROWD`` where it has none.
    """
    matched = np.full(len(found.images), NOTHING)
    found_bounds, truth_bounds = found.bounds(num_images), truth.bounds(num_images)
    for image in range(num_images):
        of_found = slice(*found_bounds[image : image + 2])
        of_truth = slice(*truth_bounds[image : image + 2])
        if of_found.start == of_found.stop or of_truth.start == of_truth.stop:
            continue
        crowd = truth.crowd[of_truth]
        iou = coco_mask.iou(found.boxes[of_found], truth.boxes[of_truth], crowd.astype(np.uint8))
        local = _match_image(iou, crowd)
        matched[of_found] = np.where(local >= 0, local + of_truth.start, local)
    return matched


def _match_image(iou: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Greedy matching of one image's (D, T) overlaps; that with a crowd region is the share of the detection in it."""
    matched = np.full(len(iou), NOTHING)
    close = iou >= IOU_THRESHOLD
    taken = crowd.copy()
    for detection in np.flatnonzero(close.any(axis=1)):
        free = np.where(taken, 0.0, iou[detection])
        best = free.argmax()
        if free[best] >= IOU_THRESHOLD:
            matched[detection] = best
            taken[best] = True
        elif (close[detection] & crowd).any():
            matched[detection] = IN_CROWD
    return matched


@dataclass(frozen=True)
class Matches:
    """A dataset's objects and detections, matched.

    Attributes:
        matched: from :func:`match_detections`.
    """

    truth: BoxTable
    found: BoxTable
    matched: np.ndarray
    num_images: int
    num_classes: int

    def is_correct(self) -> np.ndarray:
        """(D,) whether a detection lies on an object of its class."""
        has_object = self.matched >= 0
        correct = np.zeros(len(self.matched), dtype=bool)
        correct[has_object] = self.truth.classes[self.matched[has_object]] == self.found.classes[has_object]
        return correct

    def confusion(self, score_threshold: float) -> np.ndarray:
        """Counts pairs of classes.

        Returns:
            (K + 1, K + 1): true class by predicted class. The last row is the background: detections where nothing is.
            The last column are missed objects. Crowd regions and detections in them are not counted.
        """
        used = (self.found.scores >= score_threshold) & (self.matched != IN_CROWD)
        matched, predicted = self.matched[used], self.found.classes[used]
        true = np.full(len(matched), self.num_classes)
        true[matched >= 0] = self.truth.classes[matched[matched >= 0]]
        missed = ~self.truth.crowd
        missed[matched[matched >= 0]] = False
        rows = np.concatenate([true, self.truth.classes[missed]])
        columns = np.concatenate([predicted, np.full(missed.sum(), self.num_classes)])
        size = self.num_classes + 1
        return np.bincount(rows * size + columns, minlength=size * size).reshape(size, size)

    def errors(self, score_threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Counts what is wrong in every image.

        Returns:
            Two (num_images,) arrays: objects that no detection of their class lies on; and detections, not in crowd
            regions, that lie on no object of their class. A detection with a wrong class counts in both.
        """
        used = self.found.scores >= score_threshold
        correct = self.is_correct() & used
        missed = ~self.truth.crowd
        missed[self.matched[correct]] = False
        false = used & ~correct & (self.matched != IN_CROWD)
        return (
            np.bincount(self.truth.images[missed], minlength=self.num_images),
            np.bincount(self.found.images[false], minlength=self.num_images),
        )
