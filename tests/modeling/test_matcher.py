import math

import pytest
import torch

from deformable_detr.modeling import HungarianMatcher, assignment
from deformable_detr.modeling import matcher as room
from deformable_detr.modeling.assignment import Transfer
from deformable_detr.modeling.matcher import Predictions


def target(labels, boxes):
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": torch.tensor(boxes).reshape(-1, 4)}


def test_cost_matrix_equals_hand_computed_numbers():
    # One prediction with probability 0.25 for class 1; box and target are half-overlapping squares.
    logits = torch.tensor([[3.0, math.log(0.25 / 0.75)]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    cost = HungarianMatcher().cost_matrix(logits, boxes, target([1], [[0.6, 0.5, 0.2, 0.2]]))
    positive = 0.25 * 0.75**2 * -math.log(0.25)
    negative = 0.75 * 0.25**2 * -math.log(0.75)
    l1 = 0.1
    # Intersection 0.1 x 0.2, union 2 * 0.04 - 0.02 = 0.06, enclosing box 0.3 x 0.2 = 0.06: GIoU = 1/3 - 0.
    expected = 2 * (positive - negative) + 5 * l1 - 2 * (1 / 3)
    assert cost.item() == pytest.approx(expected, abs=1e-5)


def test_matching_is_a_cheapest_assignment():
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1]]])
    targets = [target([0, 0], [[0.5, 0.5, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]])]
    ((rows, columns),) = HungarianMatcher()(torch.zeros(1, 3, 1), boxes, targets)
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {0: 1, 2: 0}


def test_images_are_matched_independently():
    torch.manual_seed(0)
    logits, boxes = torch.randn(3, 7, 4), torch.rand(3, 7, 4) * 0.5 + 0.2
    targets = [target([1, 2], torch.rand(2, 4).tolist()), target([], []), target([3], torch.rand(1, 4).tolist())]
    matcher = HungarianMatcher()
    together = matcher(logits, boxes, targets)
    for i in range(3):
        ((rows, columns),) = matcher(logits[i : i + 1], boxes[i : i + 1], targets[i : i + 1])
        assert torch.equal(together[i][0], rows) and torch.equal(together[i][1], columns)
    assert [len(rows) for rows, _ in together] == [2, 0, 1]


def test_more_objects_than_queries_match_every_query_once():
    torch.manual_seed(0)
    ((rows, columns),) = HungarianMatcher()(
        torch.randn(1, 3, 2), torch.rand(1, 3, 4), [target([0] * 5, torch.rand(5, 4).tolist())]
    )
    assert rows.tolist() == [0, 1, 2]
    assert len(set(columns.tolist())) == 3


def test_non_finite_predictions_are_named_and_never_reach_scipy():
    boxes = torch.rand(2, 3, 4)
    boxes[1, 2, 0] = float("nan")
    targets = [target([0], [[0.5, 0.5, 0.1, 0.1]])] * 2
    with pytest.raises(FloatingPointError, match="image 1 .*pred_boxes has 1"):
        HungarianMatcher()(torch.zeros(2, 3, 1), boxes, targets)


def test_costs_that_overflow_are_refused_as_well():
    boxes = torch.full((1, 2, 4), 3e38)
    with pytest.raises(FloatingPointError, match="image 0 .*their costs overflow"):
        HungarianMatcher()(torch.zeros(1, 2, 1), boxes, [target([0], [[0.5, 0.5, 0.1, 0.1]])])


def test_several_groups_of_layers_match_as_each_layer_alone():
    torch.manual_seed(0)
    decoder = Predictions(["a", "b"], torch.randn(2, 2, 7, 4), torch.rand(2, 2, 7, 4) * 0.5 + 0.2)
    encoder = Predictions(["c"], torch.randn(1, 2, 11, 1), torch.rand(1, 2, 11, 4) * 0.5 + 0.2)
    targets = [target([1, 2], torch.rand(2, 4).tolist()), target([0], torch.rand(1, 4).tolist())]
    matcher = HungarianMatcher()
    together = matcher.match([decoder, encoder], targets)
    agnostic = [{"labels": t["labels"] * 0, "boxes": t["boxes"]} for t in targets]
    for group, group_targets, group_matches in zip((decoder, encoder), (targets, agnostic), together, strict=True):
        for logits, boxes, matches in zip(group.logits, group.boxes, group_matches, strict=True):
            for alone, match in zip(matcher(logits, boxes, group_targets), matches, strict=True):
                assert torch.equal(alone[0], match[0]) and torch.equal(alone[1], match[1])


@pytest.mark.parametrize("repeat", [1, 3])
def test_the_cheapest_predictions_of_each_object_are_enough(monkeypatch, repeat):
    """Objects that lie close together want the same predictions."""
    torch.manual_seed(repeat)
    layers = Predictions(["0", "1"], torch.randn(2, 3, 60, 4), torch.rand(2, 3, 60, 4) * 0.5 + 0.2, repeat)
    close = (torch.rand(5, 4) * 0.02 + 0.4).tolist()
    targets = [target([1, 1, 2, 2, 3], close), target([], []), target([0], [[0.5, 0.5, 0.1, 0.1]])]
    whole = HungarianMatcher().match([layers], targets)
    monkeypatch.setattr(assignment, "PAIRS_TO_ASSIGN", 0)
    sent = []
    pack = Transfer.pack
    monkeypatch.setattr(Transfer, "pack", lambda self, costs: sent.append(pack(self, costs)) or sent[-1])
    cheapest = HungarianMatcher().match([layers], targets)
    # Of three images and two layers, 5 * repeat costs for each of five objects, their rows, and two extremes.
    assert [len(part) for part in sent] == [3 * 2 * (2 * 5 * 5 * repeat + 2)]
    flat = [[indices for layer in group[0] for match in layer for indices in match] for group in (cheapest, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_costs_are_named_also_where_only_the_cheapest_are_compared(monkeypatch, value):
    monkeypatch.setattr(assignment, "PAIRS_TO_ASSIGN", 0)
    layers = Predictions(["first", "second"], torch.zeros(2, 1, 9, 2), torch.rand(2, 1, 9, 4))
    layers.boxes[1, 0, 4, 1] = value
    with pytest.raises(FloatingPointError, match="image 0 .* in second: pred_boxes has 1"):
        HungarianMatcher().match([layers], [target([0], [[0.5, 0.5, 0.1, 0.1]])])


def test_costs_do_not_depend_on_how_many_pairs_are_compared_at_once(monkeypatch):
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 11, 4), torch.rand(2, 11, 4)
    objects = target([1, 2, 0], torch.rand(3, 4).tolist())
    whole = HungarianMatcher().cost_matrix(logits, boxes, objects)
    monkeypatch.setattr(room, "PAIRS_AT_ONCE", 7)
    assert whole.shape == (2, 11, 3)
    torch.testing.assert_close(HungarianMatcher().cost_matrix(logits, boxes, objects), whole, rtol=0, atol=0)


def test_all_zero_weights_are_refused():
    with pytest.raises(ValueError, match="must not all be 0"):
        HungarianMatcher(cost_class=0, cost_bbox=0, cost_giou=0)
