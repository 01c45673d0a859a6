"""The two ways in which class logits are read: sigmoids with a focal loss, or a softmax with a "no object" class.

Shapes: Ld layers, N images, Lq predictions of a layer and image, K classes, n objects of one image, T matched
predictions of a layer. Matcher, criterion and selection of detections of a model must read them alike.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.precision import at_least_float32
from .detections import Detections, select_detections, select_one_per_query
from .focal_loss import matched_focal_loss


@dataclass(frozen=True)
class FocalClassification:
    """One sigmoid for each class, trained with the focal loss (Deformable DETR); logits (..., K).

    Attributes:
        alpha, gamma: of the focal loss.
    """

    alpha: float = 0.25
    gamma: float = 2.0

    def num_outputs(self, num_classes: int) -> int:
        """Logits of a prediction for K classes."""
        return num_classes

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Matching costs (N, R, n), of logits (N, R, K) and labels (N, n).

        Logits (N, R, 1), where every object counts as class 0, have costs (N, R, 1).
        """
        prob = (logits if logits.shape[-1] == 1 else _of_labels(logits, labels)).float().sigmoid()
        rest = 1 - prob
        negative = (self.alpha - 1) * prob**self.gamma * (rest + 1e-8).log()
        positive = -self.alpha * rest**self.gamma * (prob + 1e-8).log()
        return positive - negative

    def loss(self, logits: Tensor, queries: Tensor, classes: Tensor | int) -> Tensor:
        """Sum of the losses of every layer.

        Args:
            logits: (Ld, N, Lq, K).
            queries: (Ld, T) indices of the matched ones of N * Lq predictions.
            classes: (Ld, T) of their objects, or one for all.

        Returns:
            (Ld,) float32.
        """
        positives = queries * logits.shape[-1] + classes
        return matched_focal_loss(logits.flatten(1), positives, alpha=self.alpha, gamma=self.gamma)

    def normaliser(self, num_boxes: Tensor, *, predictions: int, matched: float) -> Tensor:
        """Return what the sum of a layer is divided by: ``num_boxes``, as the box losses are."""
        return num_boxes

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities (..., K) of the classes."""
        return logits.float().sigmoid()

    def selectable_scores(self, logits: Tensor) -> Tensor:
        """Return :meth:`scores`: any pair of query and class may be selected."""
        return self.scores(logits)

    def is_detection(self, logits: Tensor) -> Tensor:
        """Whether the best class is more likely than not: (..., K) -> (...)."""
        return logits.amax(-1) > 0

    def select(self, logits: Tensor, boxes: Tensor, limit: int) -> Detections:
        """Select the best pairs of query and class; see :func:`select_detections`."""
        return select_detections(logits, boxes, limit)


@dataclass(frozen=True)
class SoftmaxClassification:
    """A softmax over the classes and "no object", trained with the cross-entropy (DETR); logits (..., K + 1).

    "No object" is the last one.

    Attributes:
        eos_coef: weight of "no object" in the cross-entropy; the classes have 1.

    Raises:
        ValueError: if ``eos_coef`` is not in (0, 1].
    """

    eos_coef: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.eos_coef <= 1:
            raise ValueError(f"eos_coef must be in (0, 1], got {self.eos_coef}")

    def num_outputs(self, num_classes: int) -> int:
        """Logits of a prediction for K classes."""
        return num_classes + 1

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Matching costs (N, R, n): minus probabilities, of logits (N, R, K + 1), of the objects' classes (N, n)."""
        return -_of_labels(logits.float().softmax(-1), labels)

    def loss(self, logits: Tensor, queries: Tensor, classes: Tensor) -> Tensor:
        """Weighted sum of the cross-entropies of every layer; as :meth:`FocalClassification.loss`."""
        logits = at_least_float32(logits.flatten(1, 2))
        background = logits.shape[-1] - 1
        labels = torch.full(logits.shape[:2], background, device=logits.device).scatter(1, queries, classes)
        weights = logits.new_ones(background + 1)
        weights[background] = self.eos_coef
        return F.cross_entropy(logits.transpose(1, 2), labels, weights, reduction="none").sum(1)

    def normaliser(self, num_boxes: Tensor, *, predictions: int, matched: float) -> Tensor:
        """Return what the sum of a layer is divided by: the weights of all its predictions.

        Args:
            num_boxes: what the box losses are divided by.
            predictions: N * Lq of the step.
            matched: how many of them have an object.
        """
        return torch.full_like(num_boxes, matched + self.eos_coef * (predictions - matched))

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities (..., K) of the classes; what they lack to 1 is that of "no object"."""
        return logits.float().softmax(-1)[..., :-1]

    def selectable_scores(self, logits: Tensor) -> Tensor:
        """Return :meth:`scores`, -1 where :meth:`select` does not look: each query has its best class alone."""
        scores = self.scores(logits)
        best, labels = scores.max(-1, keepdim=True)
        return torch.full_like(scores, -1.0).scatter(-1, labels, best)

    def is_detection(self, logits: Tensor) -> Tensor:
        """Whether "no object" is not the most likely: (..., K + 1) -> (...)."""
        return logits.argmax(-1) != logits.shape[-1] - 1

    def select(self, logits: Tensor, boxes: Tensor, limit: int) -> Detections:
        """Select the best queries, each with its best class; see :func:`select_one_per_query`."""
        return select_one_per_query(self.scores(logits), boxes, limit)


Classification = FocalClassification | SoftmaxClassification


def _of_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Values (N, R, K) of the classes (N, n): (N, R, n)."""
    return values.gather(-1, labels[:, None].expand(-1, values.shape[1], -1))
