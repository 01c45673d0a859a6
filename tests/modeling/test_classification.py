"""Logits read as a softmax with "no object", as in DETR; the focal form is tested with matcher and criterion."""

import math

import pytest
import torch
from detectron2.utils.events import EventStorage

from deformable_detr.modeling import HungarianMatcher, SetCriterion, SoftmaxClassification
from deformable_detr.training.step import Step


def target(labels, boxes):
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": torch.tensor(boxes).reshape(-1, 4)}


def softmax_criterion(eos_coef=0.1, **options):
    matcher = HungarianMatcher(cost_class=1.0, classification=SoftmaxClassification(eos_coef))
    return SetCriterion(matcher, class_weight=1.0, classification=SoftmaxClassification(eos_coef), **options)


# Probabilities of two classes and of "no object"; query 0 is on the object.
PROBABILITIES = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]])
OBJECT = target([0], [[0.5, 0.5, 0.2, 0.2]])


def outputs(layers=1, images=1):
    logits = PROBABILITIES.log().expand(layers, images, 2, 3)
    return {"pred_logits": logits, "pred_boxes": BOXES.expand(layers, images, 2, 4)}


def test_a_match_costs_the_negative_probability_of_its_class():
    matcher = HungarianMatcher(cost_class=3.0, cost_bbox=0.0, cost_giou=0.0, classification=SoftmaxClassification())
    cost = matcher.cost_matrix(PROBABILITIES.log(), BOXES, target([1, 0], [[0.5, 0.5, 0.2, 0.2]] * 2))
    torch.testing.assert_close(cost, -3 * PROBABILITIES[:, [1, 0]])


def test_the_loss_is_a_weighted_mean_over_all_queries():
    losses = softmax_criterion()(outputs(), [OBJECT])
    assert losses["loss_ce"].item() == pytest.approx((math.log(2) + 0.1 * math.log(2)) / 1.1, rel=1e-6)
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0


def test_the_loss_and_its_gradient_equal_those_of_torch():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 7, 5, requires_grad=True)
    boxes = torch.rand(1, 3, 7, 4) * 0.4 + 0.3
    targets = [target([3, 0], torch.rand(2, 4).tolist()), target([], []), target([1], torch.rand(1, 4).tolist())]
    criterion = softmax_criterion(eos_coef=0.3)
    labels = torch.full((3, 7), 4)
    for image, (rows, columns) in enumerate(criterion.matcher(logits[0], boxes[0], targets)):
        labels[image, rows] = targets[image]["labels"][columns]
    weights = torch.tensor([1, 1, 1, 1, 0.3])
    expected = torch.nn.functional.cross_entropy(logits[0].transpose(1, 2), labels, weights)
    loss = criterion({"pred_logits": logits, "pred_boxes": boxes}, targets)["loss_ce"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_a_batch_without_objects_is_all_no_object():
    losses = softmax_criterion()(outputs(), [target([], [])])
    assert losses["loss_ce"].item() == pytest.approx((math.log(4) + math.log(2)) / 2, rel=1e-6)


def test_parts_of_a_step_sum_to_the_whole():
    torch.manual_seed(0)
    predictions = {"pred_logits": torch.randn(2, 3, 7, 5), "pred_boxes": torch.rand(2, 3, 7, 4) * 0.4 + 0.3}
    targets = [target([3, 0], torch.rand(2, 4).tolist()), target([], []), target([1], torch.rand(1, 4).tolist())]
    criterion = softmax_criterion()
    whole = criterion(predictions, targets)
    with criterion.normalise_by(3, 3):
        parts = [
            criterion({name: value[:, part] for name, value in predictions.items()}, targets[part])
            for part in (slice(0, 2), slice(2, 3))
        ]
    torch.testing.assert_close({name: sum(part[name] for part in parts) for name in whole}, whole)


def test_an_accumulated_step_tells_the_criterion_its_images():
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.criterion = softmax_criterion()
    step = Step([{"instances": [0]}, {"instances": []}], iteration=0, seed=0, accumulation_steps=2)
    with step._normaliser(model):
        halves = [model.criterion(outputs(), targets)["loss_ce"] for targets in ([OBJECT], [target([], [])])]
    whole = model.criterion(outputs(images=2), [OBJECT, target([], [])])["loss_ce"]
    torch.testing.assert_close(sum(halves), whole)


def test_a_cross_entropy_needs_the_number_of_images():
    with pytest.raises(ValueError, match="num_images must be given for Softmax"):
        with softmax_criterion().normalise_by(3):
            pass


def test_a_matcher_that_reads_logits_otherwise_is_refused():
    with pytest.raises(ValueError, match="same classification, got Focal.* and Softmax"):
        SetCriterion(HungarianMatcher(), classification=SoftmaxClassification())


@pytest.mark.parametrize("eos_coef", [0.0, 1.5, float("nan")])
def test_a_weight_of_no_object_outside_of_its_range_is_refused(eos_coef):
    with pytest.raises(ValueError, match=r"eos_coef must be in \(0, 1\]"):
        SoftmaxClassification(eos_coef)


def test_progress_is_logged_in_detrs_own_form():
    # The object's query says so. Of the images' detections (one each, as "no object" wins for query 1) one is too many.
    with EventStorage() as storage:
        softmax_criterion().train()(outputs(images=2), [OBJECT, target([], [])])
        latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest == {"class_error": 0.0, "cardinality_error": 0.5}


def test_a_query_is_detected_once_with_its_best_class():
    found = SoftmaxClassification().select(PROBABILITIES.log()[None], BOXES[None], 100)
    torch.testing.assert_close(found.scores, torch.tensor([[0.5, 0.3]]))
    assert found.labels.tolist() == [[0, 1]] and found.queries.tolist() == [[0, 1]]
    torch.testing.assert_close(found.boxes[0, 0], torch.tensor([0.4, 0.4, 0.6, 0.6]))
    assert SoftmaxClassification().select(PROBABILITIES.flip(0).log()[None], BOXES[None], 1).queries.tolist() == [[1]]
