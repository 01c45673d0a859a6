"""One image explained: what was recorded, what was detected, and which of it to show."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..detect import prepare_image, read_image
from ..detect.images import ImageSource
from ..loading import LoadedModel, class_index
from .recorder import Recording, record
from .selection import Detection, above_score, check_point, make_detection, rank_detections
from .truth import Truth, match_truth, read_truth


@dataclass(frozen=True)
class Explanation:
    """What pictures and page are drawn from.

    Attributes:
        name: of the image.
        image: (H, W, 3) uint8 RGB, the original.
        class_names: of the model's outputs.
        recording: the image's way through the model.
        detections: all above the score, best first, then queries that are matched to ground truth but score less.
        chosen: indices of the detections that were asked for.
        score: lowest score of a detection.
        pixel: (x, y) that was asked for.
        truths: objects of the ground truth with the queries they are matched to.
    """

    name: str
    image: np.ndarray
    class_names: Sequence[str]
    recording: Recording
    detections: list[Detection]
    chosen: list[int]
    score: float
    pixel: tuple[float, float] | None
    truths: list[Truth]

    def truth_of(self, detection: Detection) -> Truth | None:
        """Return the object that the detection's query is matched to."""
        return next((truth for truth in self.truths if truth.query == detection.query), None)

    def label_of(self, detection: Detection) -> str:
        """Class, score and query in words."""
        return f"{self.class_names[detection.label]} {detection.score:.0%} (query {detection.query})"


def explain(
    loaded: LoadedModel,
    image: ImageSource,
    *,
    detections: int = 5,
    point: tuple[float, float] | None = None,
    class_name: str | None = None,
    score: float = 0.3,
    ground_truth: str | Path | None = None,
) -> Explanation:
    """Detect on one image and record what the chosen queries looked at.

    Args:
        loaded: from :func:`deformable_detr.loading.load_model`.
        image: a path, an address, or an image in memory.
        detections: choose so many of the best detections, unless ``point`` or ``class_name`` says otherwise.
        point: choose the detection nearest to this pixel (x, y) of the image, and the encoder cells over it.
        class_name: choose all detections of this class.
        score: lowest score of a detection.
        ground_truth: file in COCO's format that has this image.

    Raises:
        ImageError: the image cannot be read (an OSError).
        ValueError: on a point outside of the image, a class that the model does not have, no detection above the
            score, or ground truth that does not fit the image.
    """
    if point is not None and class_name is not None:
        raise ValueError(f"give point or class_name, not both: got {point} and {class_name!r}")
    if detections < 1:
        raise ValueError(f"detections must be at least 1, got {detections}")
    label = None if class_name is None else class_index(class_name, loaded.class_names)
    name = Path(image).name if isinstance(image, str | os.PathLike) else "image"
    image = read_image(image)
    if point is not None:
        check_point(*point, image.shape[:2])
    recording = record(loaded.model, [prepare_image(loaded, image)])[0]
    ranked = rank_detections(recording, loaded.model.test_topk_per_image)
    found = above_score(ranked, score)
    if label is not None:
        wanted = above_score([d for d in ranked if d.label == label], score, f"detection of class {class_name!r}")
    elif point is not None:
        wanted = [min(found, key=lambda detection: detection.distance(*point))]
    else:
        wanted = found[:detections]
    truths = []
    if ground_truth is not None:
        truths = read_truth(ground_truth, name, image.shape[:2], loaded.class_names)
        truths = match_truth(recording, truths, loaded.model.criterion.matcher)
    return Explanation(
        name=name,
        image=image,
        class_names=loaded.class_names,
        recording=recording,
        detections=found + _missed(recording, found, truths),
        chosen=[found.index(detection) for detection in wanted],
        score=score,
        pixel=point,
        truths=truths,
    )


def _missed(recording: Recording, found: Sequence[Detection], truths: Sequence[Truth]) -> list[Detection]:
    """Return matched queries that are no detection, read as the class they should have had."""
    queries = {detection.query for detection in found}
    scores = recording.classification.scores(recording.pred_logits[-1])
    return [
        make_detection(recording, truth.query, truth.label, scores[truth.query, truth.label].item())
        for truth in truths
        if truth.query is not None and truth.query not in queries
    ]
