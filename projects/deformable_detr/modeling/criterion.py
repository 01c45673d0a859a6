"""Losses of Deformable DETR.

Shapes: Ld layers, N images, Lq queries, K classes, S encoder cells, T matched pairs of a layer. Boxes are cxcywh in
[0, 1] relative to each image without its padding.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from ..layers.precision import at_least_float32
from .box_overlap import Corners, generalized_iou
from .classification import Classification, FocalClassification
from .denoising import fixed_matches
from .matcher import HungarianMatcher, Match, Predictions, Target
from .proposals import take_rows


class SetCriterion(nn.Module):
    """Classification, L1 and GIoU losses of predictions matched to ground truth.

    In training mode, inside of one of Detectron2's event storages, the last layer's ``class_error`` and
    ``cardinality_error`` are logged there, within :meth:`normalise_by` once for all batches; see
    :func:`matching_errors`.

    Args:
        matcher: pairs predictions with ground truth.
        class_weight, bbox_weight, giou_weight: weights of the three losses.
        focal_alpha, focal_gamma: of the focal loss.
        classification: the classification loss; None: the focal loss, of these two.
        aux_loss: also supervise all decoder layers before the last, each with its own matching.
        one2many_repeat: one-to-many queries that each object is matched with (H-DETR, arXiv 2207.13080, section 3).
        one2many_weight: factor of their losses.

    Raises:
        ValueError: if the repetition is below 1, or its weight not positive; if the matcher reads logits otherwise.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        *,
        class_weight: float = 2.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        aux_loss: bool = True,
        one2many_repeat: int = 6,
        one2many_weight: float = 1.0,
        classification: Classification | None = None,
    ) -> None:
        super().__init__()
        classification = classification or FocalClassification(focal_alpha, focal_gamma)
        if type(matcher.classification) is not type(classification):
            raise ValueError(
                f"matcher and criterion must have the same classification, got {matcher.classification} and "
                f"{classification}"
            )
        if one2many_repeat < 1:
            raise ValueError(f"one2many_repeat must be at least 1, got {one2many_repeat}")
        if not 0 < one2many_weight < math.inf:
            raise ValueError(f"one2many_weight must be positive and finite, got {one2many_weight}")
        self.matcher = matcher
        self.class_weight = class_weight
        self.bbox_weight = bbox_weight
        self.giou_weight = giou_weight
        self.classification = classification
        self.aux_loss = aux_loss
        self.one2many_repeat = one2many_repeat
        self.one2many_weight = one2many_weight
        self._num_objects: float | None = None
        self._num_images: int | None = None
        self._is_alone = False
        # What is to be logged: the errors of a batch, and the numbers of matches and images that they are means over.
        self._errors: list[tuple[Tensor, tuple[int, int]]] = []

    @contextmanager
    def normalise_by(self, num_objects: float, num_images: int | None = None) -> Iterator[None]:
        """Within the context divide losses by what a whole step holds and not by what the batch does.

        With it the losses of the micro-batches of one accumulated step sum to the losses of the whole batch.

        Args:
            num_objects: objects of this process in the whole step; averaged over processes and kept at least 1, as
                the batch's own number is.
            num_images: images of this process in the whole step. A cross-entropy needs them, as it is a mean over all
                predictions; it takes each object to be matched.

        Raises:
            ValueError: if a number of objects is negative or not finite, or images are needed and not given.
        """
        if not 0 <= num_objects < math.inf:
            raise ValueError(f"num_objects must be finite and at least 0, got {num_objects}")
        if num_images is None and not isinstance(self.classification, FocalClassification):
            raise ValueError(f"num_images must be given for {self.classification}")
        before = self._num_objects, self._num_images
        self._num_objects, self._num_images = float(num_objects), num_images
        try:
            yield
            self._log_errors()
        finally:
            self._num_objects, self._num_images = before
            self._errors.clear()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context divide losses by the objects of this process, which then waits for no other."""
        before, self._is_alone = self._is_alone, True
        try:
            yield
        finally:
            self._is_alone = before

    # Matching is scipy's, on the host: a model that its user compiles is compiled without it.
    @torch.compiler.disable
    def forward(self, outputs: dict[str, Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Compute all losses.

        Args:
            outputs: "pred_logits" (Ld, N, Lq, K), "pred_boxes" (Ld, N, Lq, 4); for two-stage models "enc_logits"
                (N, S, K), "enc_boxes" (N, S, 4); as "pred_..." for denoising queries "dn_logits", "dn_boxes" and for
                one-to-many queries "one2many_logits", "one2many_boxes". Encoder predictions are matched with objects of
                whatever class, unless "enc_chosen" (N, at least Lq) names the cells that became queries: then only
                the first Lq of these are matched, and with the objects' classes.
            targets: per image "labels" (n,) int64 in [0, K) and "boxes" (n, 4).

        Returns:
            Weighted scalars "loss_ce", "loss_bbox", "loss_giou" of the last layer, with suffix ``_0`` ... of the
            layers before it and ``_enc`` of the encoder's proposals; ``_dn``, ``_dn_0`` ... of denoising queries and
            ``_one2many``, ``_one2many_0`` ... of one-to-many queries. Their sum is the training loss.

        Raises:
            FloatingPointError: if a prediction is NaN or infinite, naming the layer and the image.
        """
        groups = self._groups(outputs, targets)
        matches = self._match(groups, targets)
        losses = self._losses(groups, matches, targets)
        if self.training and _active_storage() is not None:
            logits, last = groups[0].predictions.logits[-1], matches[0][-1]
            errors = matching_errors(logits, targets, last, classification=self.classification)
            self._errors.append((errors, (sum(len(queries) for queries, _ in last), len(targets))))
            if self._num_objects is None:
                self._log_errors()
        return losses

    def _log_errors(self) -> None:
        """Log means over all matches and all images since the last call."""
        if not self._errors or (storage := _active_storage()) is None:
            return
        values, counts = zip(*self._errors, strict=True)
        columns = zip(torch.stack(values, dim=1).tolist(), zip(*counts, strict=True), strict=True)
        for name, (parts, weights) in zip(("class_error", "cardinality_error"), columns, strict=True):
            mean = sum(map(mul, parts, weights)) / max(1, sum(weights))
            storage.put_scalar(name, mean)
        self._errors.clear()

    def _groups(self, outputs: dict[str, Tensor], targets: Sequence[Target]) -> list["_Group"]:
        groups = [self._decoder_group(outputs, "pred")]
        if "enc_logits" in outputs:
            groups.append(_encoder_group(outputs))
        if "dn_logits" in outputs:
            matches, num_groups = fixed_matches(outputs["dn_boxes"].shape[2], targets)
            denoising = self._decoder_group(outputs, "dn")
            groups.append(denoising._replace(fixed_matches=matches, copies=num_groups))
        if "one2many_logits" in outputs:
            one2many = self._decoder_group(outputs, "one2many", repeat=self.one2many_repeat)
            groups.append(one2many._replace(weight=self.one2many_weight))
        return groups

    def _decoder_group(self, outputs: dict[str, Tensor], kind: str, *, repeat: int = 1) -> "_Group":
        logits, boxes = outputs[f"{kind}_logits"], outputs[f"{kind}_boxes"]
        layers = len(logits)
        first = 0 if self.aux_loss else layers - 1
        of_kind = "" if kind == "pred" else f"_{kind}"
        names = [f"decoder layer {layer}{of_kind}" for layer in range(first, layers)]
        suffixes = [f"{of_kind}_{layer}" for layer in range(first, layers - 1)] + [of_kind]
        return _Group(Predictions(names, logits[first:], boxes[first:], repeat), suffixes)

    def _match(self, groups: Sequence["_Group"], targets: Sequence[Target]) -> list[Sequence[Sequence[Match]]]:
        to_match = [group.to_match for group in groups if group.fixed_matches is None]
        found = iter(self.matcher.match(to_match, targets))
        return [
            next(found) if group.fixed_matches is None else [group.fixed_matches] * len(group.suffixes)
            for group in groups
        ]

    def _losses(
        self, groups: Sequence["_Group"], matches: Sequence[Sequence[Sequence[Match]]], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Losses of all layers of all groups, each name with a suffix per layer."""
        labels = torch.cat([t["labels"] for t in targets])
        target_boxes = at_least_float32(torch.cat([t["boxes"] for t in targets]))
        num_objects = self._num_objects_per_process(targets, target_boxes.device)
        num_boxes = [group.num_boxes(num_objects).expand(len(group.suffixes)) for group in groups]
        class_losses, class_normalisers, matched, wanted = [], [], [], []
        for group, group_matches, number in zip(groups, matches, num_boxes, strict=True):
            logits, boxes = group.predictions.logits, group.predictions.boxes
            queries, objects = _flat_indices(group_matches, targets, num_queries=boxes.shape[2], device=boxes.device)
            classes = 0 if group.is_agnostic else labels[objects]
            class_losses.append(self.classification.loss(logits, queries, classes))
            class_normalisers.append(self._class_normaliser(number, logits, queries))
            matched.append(at_least_float32(boxes.flatten(1, 2).gather(1, queries[..., None].expand(-1, -1, 4))))
            wanted.append(target_boxes[objects].to(matched[-1].dtype))
        l1, giou = _box_losses(matched, wanted)
        box_normaliser = torch.cat(num_boxes)
        weighted = {
            "loss_ce": torch.cat(class_losses) * (self.class_weight / torch.cat(class_normalisers)),
            "loss_bbox": l1 * (self.bbox_weight / box_normaliser),
            "loss_giou": giou * (self.giou_weight / box_normaliser),
        }
        suffixes = [suffix for group in groups for suffix in group.suffixes]
        return {
            name + suffix: value
            for name, values in weighted.items()
            for suffix, value in zip(suffixes, values.unbind(), strict=True)
        }

    def _class_normaliser(self, num_boxes: Tensor, logits: Tensor, queries: Tensor) -> Tensor:
        """Return what the classification loss of every layer of a group is divided by, (Ld,)."""
        images = logits.shape[1] if self._num_images is None else self._num_images
        matched = queries.shape[1] if self._num_images is None else self._num_objects
        return self.classification.normaliser(num_boxes, predictions=images * logits.shape[2], matched=matched)

    def _num_objects_per_process(self, targets: Sequence[Target], device: torch.device) -> Tensor:
        """Objects per process over the whole distributed batch, or within :meth:`alone` of this one."""
        own = sum(len(t["labels"]) for t in targets) if self._num_objects is None else self._num_objects
        count = torch.full((), float(own), device=device)
        if not self._is_alone and dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return count


class _Group(NamedTuple):
    """Layers that are supervised together.

    Attributes:
        suffixes: of the names of the losses, one per layer.
        is_agnostic: whether every object is class 0: proposals may tell objects from background alone.
        fixed_matches: per image, of every layer; None where predictions are matched by their costs.
        copies: of the objects, in queries that know whose they are.
        weight: of all losses.
    """

    predictions: Predictions
    suffixes: Sequence[str]
    is_agnostic: bool = False
    fixed_matches: Sequence[Match] | None = None
    copies: int = 1
    weight: float = 1.0

    @property
    def to_match(self) -> Predictions:
        """The predictions with the logits by which they are matched."""
        logits = self.predictions.logits
        return self.predictions._replace(logits=logits[..., :1]) if self.is_agnostic else self.predictions

    def num_boxes(self, num_objects: Tensor) -> Tensor:
        """Return what the losses are divided by: the positives of a process, with so many objects, at least 1."""
        return (num_objects * self.predictions.repeat).clamp(min=1) * (self.copies / self.weight)


def _encoder_group(outputs: dict[str, Tensor]) -> _Group:
    # The official code drops this loss when aux_loss is off, which leaves the proposals untrained; here it belongs to
    # two-stage training as such.
    logits, boxes = outputs["enc_logits"], outputs["enc_boxes"]
    has_classes = "enc_chosen" in outputs
    if has_classes:
        chosen = outputs["enc_chosen"][:, : outputs["pred_logits"].shape[2]]
        logits, boxes = take_rows(logits, chosen), take_rows(boxes, chosen)
    predictions = Predictions(["the encoder's proposals"], logits[None], boxes[None])
    return _Group(predictions, ["_enc"], is_agnostic=not has_classes)


def _box_losses(matched: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """L1 and GIoU losses, summed by layer.

    Args:
        matched, wanted: per group (Ld, T, 4) boxes.

    Returns:
        (layers of all groups,) each.
    """
    sizes = [boxes.shape[:2] for boxes in matched]
    predicted, target = (torch.cat([boxes.flatten(0, 1) for boxes in group]) for group in (matched, wanted))
    l1 = F.l1_loss(predicted, target, reduction="none").sum(1)
    giou = 1 - generalized_iou(Corners.of(predicted), Corners.of(target))
    by_group = torch.stack((l1, giou)).split([layers * count for layers, count in sizes], dim=1)
    sums = [losses.view(2, *size).sum(2) for losses, size in zip(by_group, sizes, strict=True)]
    return torch.cat(sums, dim=1).unbind()


@torch.no_grad()
def matching_errors(
    logits: Tensor,
    targets: Sequence[Target],
    matches: Sequence[Match],
    *,
    classification: Classification | None = None,
) -> Tensor:
    """DETR's two measures of progress, for logging only.

    DETR counts a query as a detection if its best class is not the last one, "no object". Deformable DETR has no such
    class (its own code keeps the formula, which then says nothing): here the best class must be more likely than not.

    Args:
        logits: (N, Lq, K) of one layer.
        targets: per image "labels" (n,).
        matches: per image indices of matched queries and of their targets.
        classification: how the logits are read; None: as sigmoids.

    Returns:
        (2,) float32: percentage of matched queries whose best class is not their object's (0 without objects), and
        mean absolute difference of the numbers of detections and objects of an image.
    """
    predicted = logits.argmax(-1)
    queries, objects = _flat_indices([matches], targets, num_queries=logits.shape[1], device=logits.device)
    wrong = predicted.flatten()[queries] != torch.cat([t["labels"] for t in targets])[objects]
    detections = (classification or FocalClassification()).is_detection(logits).sum(1)
    present = torch.tensor([len(t["labels"]) for t in targets]).to(logits.device, non_blocking=True)
    return torch.stack((100.0 * wrong.sum() / max(1, wrong.numel()), (detections - present).abs().float().mean()))


def _flat_indices(
    matches: Sequence[Sequence[Match]], targets: Sequence[Target], *, num_queries: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return matches of Ld layers as indices into a layer's N*Lq predictions and into all objects, (Ld, T) each.

    Every layer has the same number T of matches.
    """
    starts = list(accumulate((len(t["labels"]) for t in targets), initial=0))
    pairs = [[(rows.numpy(), columns.numpy()) for rows, columns in layer] for layer in matches]
    queries = [np.concatenate([rows + i * num_queries for i, (rows, _) in enumerate(layer)]) for layer in pairs]
    objects = [np.concatenate([columns + starts[i] for i, (_, columns) in enumerate(layer)]) for layer in pairs]
    return torch.from_numpy(np.stack((queries, objects))).to(device, non_blocking=True).unbind()


def _active_storage() -> EventStorage | None:
    """Where the trainer collects this iteration's scalars; None outside of training."""
    try:
        return get_event_storage()
    except AssertionError:  # Detectron2 has no other way to ask that all of its versions share.
        return None
