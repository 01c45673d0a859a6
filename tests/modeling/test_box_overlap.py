import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss

from deformable_detr.modeling.box_overlap import Corners, generalized_iou


def test_overlap_of_two_unit_squares_half_a_side_apart():
    """In common 1/2, together 3/2, in a hull of 3/2: 1/3. Two sides apart: nothing in common, 2 in a hull of 3."""
    square = Corners.of(torch.tensor([0.5, 0.5, 1.0, 1.0]))
    others = Corners.of(torch.tensor([[1.0, 0.5, 1.0, 1.0], [2.5, 0.5, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0]]))
    overlap = generalized_iou(Corners(*(side[:, None] for side in square)), others)
    torch.testing.assert_close(overlap, torch.tensor([1 / 3, -1 / 3, 1.0]))


@pytest.fixture
def boxes():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, 4, generator=generator) * 0.5 + 0.01 for count in (50, 7)]


def test_of_all_pairs_it_is_that_of_torchvision(boxes):
    expected = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in boxes))
    assert torch.equal(generalized_iou(Corners.of(boxes[0][:, None]), Corners.of(boxes[1][None])), expected)


def test_its_gradient_is_that_of_torchvisions_loss(boxes):
    predicted, target = boxes[0][:25].requires_grad_(), boxes[0][25:]
    corners = [box_convert(b, "cxcywh", "xyxy") for b in (predicted, target)]
    (expected,) = torch.autograd.grad(generalized_box_iou_loss(*corners, eps=0.0).sum(), predicted)
    (found,) = torch.autograd.grad((1 - generalized_iou(Corners.of(predicted), Corners.of(target))).sum(), predicted)
    torch.testing.assert_close(found, expected)
