"""Denoising queries: their number, layout, noise and mask."""

import pytest
import torch
from torch.nn.functional import one_hot
from torchvision.ops import box_convert

from deformable_detr.modeling.denoising import ContrastiveDenoising, attention_mask, fixed_matches


def targets_of(*counts, classes=7, seed=0):
    """Per image so many objects, all of them inside of the image."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "labels": torch.randint(classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.2 + 0.3,
        }
        for count in counts
    ]


def make(counts=(2, 1), *, classes=7, **options):
    torch.manual_seed(0)
    denoising = ContrastiveDenoising(num_classes=classes, embed_dim=8, **options)
    targets = targets_of(*counts, classes=classes)
    return denoising, targets, denoising(targets)


@pytest.mark.parametrize(
    ("counts", "num_groups", "num_queries"),
    [((5, 3), 20, 200), ((40, 2), 2, 160), ((101, 3), 1, 202), ((250, 3), 1, 500), ((0, 0), 100, 0), ((49,), 2, 196)],
)
def test_there_are_as_many_groups_as_the_pairs_of_the_fullest_image_allow(counts, num_groups, num_queries):
    _, _, queries = make(counts)
    assert queries.num_groups == num_groups and queries.group_size == 2 * max(counts)
    assert queries.content.shape == (len(counts), num_queries, 8)
    assert queries.boxes.shape == (len(counts), num_queries, 4)
    assert queries.boxes.dtype == torch.float32 and not queries.boxes.requires_grad


def test_without_noise_objects_stand_in_order_in_both_halves_of_every_group():
    denoising, targets, queries = make((2, 1), dn_number=4, label_noise_ratio=0.0, box_noise_scale=0.0)
    assert queries.num_groups == 2
    # Positives and negatives of group 0, then of group 1.
    objects = [[0, 1, 0, 1, 0, 1, 0, 1], [0, None, 0, None, 0, None, 0, None]]
    for image, row in enumerate(objects):
        for query, number in enumerate(row):
            content, box = queries.content[image, query], queries.boxes[image, query]
            if number is None:
                assert content.eq(0).all() and box.eq(0.5).all()
            else:
                assert torch.equal(content, denoising.label_enc.weight[targets[image]["labels"][number]])
                torch.testing.assert_close(box, targets[image]["boxes"][number])


def test_positives_are_matched_with_their_objects_and_nothing_else_is():
    _, targets, queries = make((2, 0, 1), dn_number=4)
    matches, num_groups = fixed_matches(queries.boxes.shape[1], targets)
    assert num_groups == 2
    rows = [(queries.tolist(), objects.tolist()) for queries, objects in matches]
    assert rows == [([0, 1, 4, 5], [0, 1, 0, 1]), ([], []), ([0, 4], [0, 0])]
    assert fixed_matches(0, targets_of(0, 0))[1] == 1


def test_sides_move_by_up_to_half_of_the_size_for_positives_and_from_half_to_once_for_negatives():
    _, targets, queries = make((5,), dn_number=5000)
    boxes = queries.boxes.view(1000, 2, 5, 4)
    truth = targets[0]["boxes"]
    moved = (box_convert(boxes, "cxcywh", "xyxy") - box_convert(truth, "cxcywh", "xyxy")).abs()
    half = truth[:, 2:].repeat(1, 2) / 2
    positive, negative = (moved / half).unbind(1)
    # No side leaves the image: centres are in [0.3, 0.5], and a shift is at most a size, of at most 0.5.
    assert positive.max() <= 1 + 1e-4 and positive.max() > 0.99 and positive.min() < 0.01
    assert positive.mean().item() == pytest.approx(0.5, abs=0.01)
    # Those whose sides have passed each other have no width left, and are not where they were moved.
    usual = (boxes[:, 1, :, 2:] > 1e-4).repeat(1, 1, 2)
    clamped = box_convert(boxes[:, 1], "cxcywh", "xyxy")
    usual &= (clamped > 1e-4) & (clamped < 1 - 1e-4)
    assert 1 - 1e-3 <= negative[usual].min() < 1.01 and 1.99 < negative[usual].max() <= 2 + 1e-3
    # Both sides move inwards, by more than half of the size each.
    assert (boxes[:, 1, :, 2:] < 1e-4).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (boxes[:, 0, :, 2:] > 1e-5).all()


def test_boxes_stay_in_the_image_and_have_the_least_size():
    torch.manual_seed(0)
    denoising = ContrastiveDenoising(num_classes=1, embed_dim=4, inverse_sigmoid_eps=1e-3)
    large = {"labels": torch.zeros(1, dtype=torch.int64), "boxes": torch.tensor([[0.5, 0.5, 1.0, 0.01]])}
    boxes = denoising([large]).boxes
    least = 1e-3 / 1.001
    assert boxes.min().item() == pytest.approx(least, abs=1e-6)
    corners = box_convert(boxes, "cxcywh", "xyxy")
    assert corners.min() >= -least and corners.max() <= 1 + least


@pytest.mark.parametrize(("label_noise_ratio", "share"), [(0.5, 0.25), (1.0, 0.5), (0.0, 0.0)])
def test_half_of_the_share_of_labels_is_drawn_anew_from_all_classes(label_noise_ratio, share):
    classes = 4
    denoising, targets, queries = make((10,), classes=classes, dn_number=20_000, label_noise_ratio=label_noise_ratio)
    labels = torch.cdist(queries.content[0].detach(), denoising.label_enc.weight.detach()).argmin(1).view(-1, 10)
    changed = labels != targets[0]["labels"]
    # A quarter of the drawn ones are what they were.
    assert changed.float().mean().item() == pytest.approx(share * 3 / 4, abs=0.01)
    if share:
        wrong = one_hot(labels[:, 0], classes).float().mean(0)
        wrong[targets[0]["labels"][0]] -= 1 - share
        torch.testing.assert_close(wrong, torch.full((classes,), share / classes), atol=0.01, rtol=0)


def test_noise_is_drawn_from_the_global_generator():
    denoising, targets, _ = make()
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(denoising(targets))
    assert torch.equal(states[0].boxes, states[1].boxes) and torch.equal(states[0].content, states[1].content)
    assert not torch.equal(states[0].boxes, states[2].boxes)


def test_the_label_embedding_has_a_gradient_where_nothing_is_denoised():
    denoising, _, queries = make((0, 0))
    queries.content.sum().backward()
    assert denoising.label_enc.weight.grad.eq(0).all()


def test_groups_see_themselves_and_the_matching_queries_and_nobody_sees_them():
    mask = attention_mask(2, 2, 3, 1, device=torch.device("cpu"))
    d1, d2 = [0, 0, 1, 1, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 1]
    matching, one2many = [1, 1, 1, 1, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 0]
    assert mask.int().tolist() == [d1, d1, d2, d2, matching, matching, matching, one2many]


def test_without_further_queries_there_is_no_mask():
    assert attention_mask(100, 0, 3, 0, device=torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dn_number": 0}, "dn_number of denoising must be at least 1, got 0"),
        ({"label_noise_ratio": 1.5}, r"label_noise_ratio must be in \[0, 1\], got 1.5"),
        ({"box_noise_scale": -0.1}, "box_noise_scale must be finite and at least 0, got -0.1"),
        ({"box_noise_scale": float("nan")}, "box_noise_scale must be finite and at least 0, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveDenoising(num_classes=3, embed_dim=4, **options)
