"""Compares the detections of an exported program with those of the model itself.

Shapes: N images, Lq queries, K classes, k detections.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import detectron2.data.transforms as T
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .program import DetectionProgram, InputShape

# Largest difference of a score, or of a box coordinate in units of the image's side, that counts as agreement.
TOLERANCE = 1e-3
# (images, image_sizes) -> boxes, scores, labels, as DetectionProgram.forward documents.
Runner = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class DisagreementError(RuntimeError):
    """An exported program does not compute what the model computes."""


@dataclass(frozen=True)
class Difference:
    """The largest differences between detections of one batch; infinite where they do not correspond at all."""

    boxes: float
    scores: float

    def __str__(self) -> str:
        return f"boxes {self.boxes:.1e}, scores {self.scores:.1e}"


def check_agreement(
    program: DetectionProgram, run: Runner, images: Sequence[np.ndarray], shape: InputShape
) -> Iterator[tuple[str, Difference]]:
    """Run the exported program and the model on images alone and together in padded batches.

    Args:
        program: what was exported; runs eagerly here.
        run: runs the exported file.
        images: at least two (H, W, 3) uint8 RGB, of different sizes, that fit into ``shape.size``.
        shape: of the exported program's input.

    Yields:
        A description of each batch and its difference.

    Raises:
        DisagreementError: after the first batch whose difference exceeds ``TOLERANCE``.
    """
    for batch, image_sizes in _batches(images, shape):
        arguments = batch.to(program.model.device), image_sizes.to(program.model.device)
        with torch.no_grad():
            difference = compare_detections(run(*arguments), program.scores_and_boxes(*arguments))
        sizes = " and ".join(f"{height}x{width}" for height, width in image_sizes.tolist())
        description = f"{sizes} on a canvas of {batch.shape[2]}x{batch.shape[3]}"
        yield description, difference
        # Written so that NaN fails.
        if not (difference.boxes <= TOLERANCE and difference.scores <= TOLERANCE):
            raise DisagreementError(
                f"the exported program differs from the model for {description}: {difference}; "
                f"at most {TOLERANCE:g} is accepted"
            )


def compare_detections(actual: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Difference:
    """Return the largest difference when every detection is matched to a prediction of its own.

    The order among nearly equal scores is left to rounding, and so is which of them are the last of the best k.

    Args:
        actual: boxes (N, k, 4), scores (N, k), labels (N, k).
        expected: scores (N, Lq, K) and boxes (N, Lq, 4) of all predictions.
    """
    boxes, scores, labels = (tensor.cpu() for tensor in actual)
    all_scores, all_boxes = (tensor.cpu() for tensor in expected)
    best = all_scores.flatten(1).topk(scores.shape[1]).values
    # Sorting is continuous: these differ by no more than the scores themselves.
    by_rank = (scores.sort(dim=1, descending=True).values - best).abs().max().item()
    images = zip(boxes, scores, labels, all_scores, all_boxes, strict=True)
    matched = [_match(*image) for image in images]
    return Difference(
        boxes=max(difference.boxes for difference in matched),
        scores=max([by_rank, *(difference.scores for difference in matched)]),
    )


def _match(boxes: Tensor, scores: Tensor, labels: Tensor, all_scores: Tensor, all_boxes: Tensor) -> Difference:
    """:func:`compare_detections` for one image, without N."""
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        return Difference(float("inf"), float("inf"))
    lowest = all_scores.flatten().topk(len(scores)).values[-1] - TOLERANCE
    queries, classes = (all_scores >= lowest).nonzero(as_tuple=True)
    box_differences = (boxes[:, None] - all_boxes[queries]).abs().amax(-1)
    score_differences = (scores[:, None] - all_scores[queries, classes]).abs()
    same_class = labels[:, None] == classes
    # Boxes and scores are at most 1: a wrong class costs more than every other mistake together.
    cost = torch.where(same_class, box_differences + score_differences, 10.0 * len(scores))
    rows, columns = linear_sum_assignment(cost.numpy())
    if not same_class[rows, columns].all():
        return Difference(float("inf"), float("inf"))
    return Difference(box_differences[rows, columns].max().item(), score_differences[rows, columns].max().item())


def _batches(images: Sequence[np.ndarray], shape: InputShape) -> Iterator[tuple[Tensor, Tensor]]:
    """Each image alone and the first two together, or batches of the one size that the program takes."""
    if shape.batch is None:
        groups = [[image] for image in images] + [list(images[:2])]
    else:
        starts = range(0, len(images), shape.batch)
        groups = [[images[(start + i) % len(images)] for i in range(shape.batch)] for start in starts]
    for group in groups:
        # A program for one image at a time meets padding only on a canvas that is larger than the image.
        yield pad_images(group, shape.size or _common_size(images if shape.batch == 1 else group))


def pad_images(images: Sequence[np.ndarray], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Put images into the top left corners of canvases.

    Args:
        images: (H, W, 3) uint8.
        canvas: (height, width), at least every image's.

    Returns:
        (N, 3, height, width) uint8 and the sizes (N, 2) int64 of the images.
    """
    batch = torch.zeros(len(images), 3, *canvas, dtype=torch.uint8)
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[0], : image.shape[1]] = torch.from_numpy(image.transpose(2, 0, 1).copy())
    return batch, torch.tensor([image.shape[:2] for image in images])


def prepare_images(
    images: Sequence[np.ndarray], resize: T.Augmentation, canvas: tuple[int, int] | None
) -> list[np.ndarray]:
    """Resize as for evaluation and, where a canvas (height, width) is given, on until the image fits into it.

    Args:
        images: (H, W, 3) uint8 RGB.

    Returns:
        The images, the second of another size than the first: padding is met in a batch of both. Where all are of one
        size, it is a smaller copy of the first.
    """
    prepared = []
    for image in images:
        inputs = T.AugInput(image)
        resize(inputs)
        prepared.append(_shrink(inputs.image, canvas or inputs.image.shape[:2]))
    height, width = prepared[0].shape[:2]
    others = [index for index, image in enumerate(prepared) if image.shape[:2] != (height, width)]
    second = prepared.pop(others[0]) if others else _shrink(prepared[0], (height * 3 // 4, width))
    return [prepared[0], second, *prepared[1:]]


def _shrink(image: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    height, width = image.shape[:2]
    scale = min(canvas[0] / height, canvas[1] / width)
    if scale >= 1:
        return image
    new_height, new_width = (max(1, int(side * scale)) for side in (height, width))
    return T.ResizeTransform(height, width, new_height, new_width).apply_image(image)


def draw_pictures() -> list[np.ndarray]:
    """Two pictures (H, W, 3) uint8 RGB, landscape and portrait: coloured rectangles on a gradient, always the same."""
    rng = np.random.default_rng(0)
    pictures = []
    for height, width in ((480, 640), (600, 400)):
        ramp = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 80, width))
        picture = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1)
        for _ in range(12):
            y, x = rng.integers(0, (height - 40, width - 40))
            h, w = rng.integers(20, 200, 2)
            picture[y : y + h, x : x + w] = rng.integers(0, 256, 3)
        noise = rng.normal(0, 4, picture.shape)
        pictures.append((picture + noise).clip(0, 255).astype(np.uint8))
    return pictures


def _common_size(images: Sequence[np.ndarray]) -> tuple[int, int]:
    height, width = (max(sizes) for sizes in zip(*(image.shape[:2] for image in images), strict=True))
    return height, width
