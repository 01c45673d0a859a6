"""Exact comparison of detections whose order is free where scores are equal."""

import math

import numpy as np
import pytest
import torch

from deformable_detr.export.agreement import compare_detections, draw_pictures, pad_images, prepare_images
from deformable_detr.modeling import SoftmaxClassification

# One image, three queries, two classes.
SCORES = torch.tensor([[[0.9, 0.1], [0.5, 0.2], [0.3, 0.5]]])
BOXES = torch.tensor([[[0.1, 0.1, 0.4, 0.4], [0.2, 0.2, 0.6, 0.6], [0.5, 0.5, 0.9, 0.9]]])


def detections(*chosen):
    """The given (query, class) pairs as a program would return them."""
    queries, classes = (torch.tensor(indices) for indices in zip(*chosen, strict=True))
    return BOXES[:, queries].clone(), SCORES[:, queries, classes].clone(), classes[None]


@pytest.mark.parametrize("chosen", [((0, 0), (1, 0), (2, 1)), ((0, 0), (2, 1), (1, 0)), ((0, 0), (2, 1)), ((0, 0),)])
def test_equal_scores_may_come_in_any_order_and_either_may_be_the_last(chosen):
    difference = compare_detections(detections(*chosen), (SCORES, BOXES))
    assert difference.boxes == difference.scores == 0


def test_the_largest_deviation_of_boxes_and_of_scores_is_told():
    boxes, scores, labels = detections((0, 0), (1, 0), (2, 1))
    boxes[0, 1, 3] += 0.02
    boxes[0, 2, 0] -= 0.05
    scores[0, 0] += 0.03
    difference = compare_detections((boxes, scores, labels), (SCORES, BOXES))
    assert difference.boxes == pytest.approx(0.05) and difference.scores == pytest.approx(0.03)


def test_a_detection_that_is_given_twice_is_no_agreement():
    boxes, scores, labels = detections((0, 0), (1, 0), (1, 0))
    assert compare_detections((boxes, scores, labels), (SCORES, BOXES)).boxes == math.inf


def test_a_wrong_class_is_no_agreement():
    boxes, scores, labels = detections((0, 0), (1, 0))
    assert compare_detections((boxes, scores, 1 - labels), (SCORES, BOXES)).boxes == math.inf


def test_of_a_softmax_only_the_best_class_of_a_query_is_agreed_with():
    softmax = SoftmaxClassification()
    logits = torch.tensor([[[2.0, 0.0, 1.0], [1.0, 0.5, 3.0], [0.0, 0.1, 0.0]]])
    found = softmax.select(logits, BOXES, 2)
    expected = softmax.selectable_scores(logits), BOXES
    found = (BOXES[:, found.queries[0]], found.scores, found.labels)
    assert compare_detections(found, expected).boxes == 0
    assert compare_detections((*found[:2], torch.zeros_like(found[2])), expected).boxes == math.inf
    assert expected[0].amin() == -1 and torch.equal(expected[0].amax(-1), softmax.scores(logits).amax(-1))


@pytest.mark.parametrize("part", [0, 1])
def test_nan_is_no_agreement(part):
    result = detections((0, 0), (1, 0))
    result[part].flatten()[0] = math.nan
    assert not compare_detections(result, (SCORES, BOXES)).boxes <= 1


def test_a_missed_best_detection_is_a_difference_of_scores():
    difference = compare_detections(detections((1, 0), (2, 1)), (SCORES, BOXES))
    assert difference.scores == pytest.approx(0.4)


def test_images_stand_in_the_top_left_corner_of_their_canvas():
    images = [np.full((2, 3, 3), 7, np.uint8), np.full((3, 1, 3), 9, np.uint8)]
    batch, image_sizes = pad_images(images, (3, 4))
    assert image_sizes.tolist() == [[2, 3], [3, 1]]
    assert batch[0, 0].tolist() == [[7, 7, 7, 0], [7, 7, 7, 0], [0, 0, 0, 0]]
    assert batch[1, 2].tolist() == [[9, 0, 0, 0]] * 3


def test_pictures_fit_a_fixed_canvas_and_are_of_two_sizes(tiny_model):
    resize = tiny_model().resize
    assert [image.shape[:2] for image in prepare_images(draw_pictures(), resize, None)] == [(64, 85), (96, 64)]
    landscape, portrait = draw_pictures()
    for pictures in ([landscape, portrait], [landscape], [landscape] * 3, [landscape, landscape, portrait]):
        # The first two share a batch.
        first, second, *_ = (image.shape[:2] for image in prepare_images(pictures, resize, (64, 70)))
        assert first == (52, 70) and second != first and max(second) <= 64


def test_a_picture_of_one_row_keeps_it(tiny_model):
    images = prepare_images([np.zeros((1, 1000, 3), np.uint8)], tiny_model().resize, (64, 70))
    assert [image.shape[:2] for image in images] == [(1, 70), (1, 1)]
