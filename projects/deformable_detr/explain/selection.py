"""Which queries to explain: by rank, by a pixel, by class."""

from collections.abc import Sequence
from typing import NamedTuple

from .recorder import Recording


class Detection(NamedTuple):
    """A query read as a class.

    Attributes:
        query: index into the Lq queries.
        label: class index.
        score: probability in [0, 1].
        box: xyxy in pixels of the original image.
    """

    query: int
    label: int
    score: float
    box: tuple[float, float, float, float]

    def distance(self, x: float, y: float) -> tuple[float, float]:
        """Squared pixels from (x, y) to the box, 0 inside, and then to its centre: nearest boxes compare lowest."""
        x0, y0, x1, y1 = self.box
        outside = max(x0 - x, 0, x - x1), max(y0 - y, 0, y - y1)
        return sum(d * d for d in outside), ((x0 + x1) / 2 - x) ** 2 + ((y0 + y1) / 2 - y) ** 2


def rank_detections(recording: Recording, limit: int) -> list[Detection]:
    """Return the model's detections with their queries, best first.

    Args:
        limit: how many, ``model.test_topk_per_image``.
    """
    found = recording.classification.select(recording.pred_logits[-1:], recording.pred_boxes[-1:], limit)
    columns = (column[0].tolist() for column in (found.queries, found.labels, found.scores))
    return [make_detection(recording, *row) for row in zip(*columns, strict=True)]


def make_detection(recording: Recording, query: int, label: int, score: float) -> Detection:
    return Detection(query, label, score, tuple(recording.boxes[-1, query].tolist()))


def above_score(detections: Sequence[Detection], score: float, what: str = "detection") -> list[Detection]:
    """Those of at least ``score``.

    Raises:
        ValueError: there is none; names the best score.
    """
    found = [detection for detection in detections if detection.score >= score]
    if not found:
        best = f"the best has {detections[0].score:.3f}" if detections else "the model returned none"
        raise ValueError(f"no {what} has a score of at least {score}: {best}")
    return found


def check_point(x: float, y: float, size: tuple[int, int]) -> None:
    """Refuse a pixel outside of an image of ``size`` (height, width) with a ValueError."""
    height, width = size
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"point must be in the image, 0 <= x < {width} and 0 <= y < {height}, got ({x:g}, {y:g})")
