"""Predictions and ground truth of every size, with values as wild as training can make them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_convert

from deformable_detr.modeling import HungarianMatcher, SetCriterion
from deformable_detr.modeling.reference_points import apply_box_deltas, inverse_sigmoid

SIZES = {
    "images": st.integers(1, 3),
    "queries": st.integers(1, 12),
    "classes": st.integers(1, 6),
    "objects": st.lists(st.integers(0, 15), min_size=3, max_size=3),
    "scale": st.sampled_from([0.0, 1.0, 10.0, 1e4, 1e30]),
    "seed": st.integers(0, 2**32 - 1),
}


def make_case(images, queries, classes, objects, scale, seed, *, layers=2):
    """Predictions of all layers, (Ld, N, Lq, K) and (Ld, N, Lq, 4), and targets; boxes may have no size at all."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, images, queries, classes, generator=generator) * scale
    boxes = torch.rand(layers, images, queries, 4, generator=generator)
    boxes[boxes < 0.1] = 0.0
    targets = [
        {
            "labels": torch.randint(classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator).clamp(min=1e-4),
        }
        for count in objects[:images]
    ]
    return logits, boxes, targets


def test_matches_are_one_to_one_and_no_swap_is_cheaper(outcomes):
    matcher = HungarianMatcher()

    @given(**SIZES)
    def check(**case):
        logits, boxes, targets = make_case(**case)
        for image, (rows, columns) in enumerate(matcher(logits[0], boxes[0], targets)):
            count = min(case["queries"], len(targets[image]["labels"]))
            assert len(rows) == len(columns) == count
            assert len(set(rows.tolist())) == len(set(columns.tolist())) == count
            cost = matcher.cost_matrix(logits[0, image], boxes[0, image], targets[image]).double()
            chosen = cost[rows, columns]
            # Exchanging the objects of two matched predictions never pays; float32 rounding of huge costs apart.
            crossed = cost[rows][:, columns]
            gain = (chosen[:, None] + chosen) - (crossed + crossed.T)
            assert (gain <= 1e-5 * (1 + cost.abs().sum())).all()
        outcomes["matched"] += 1

    check()


def test_predictions_that_are_not_finite_never_reach_the_solver(outcomes):
    criterion = SetCriterion(HungarianMatcher())

    @given(**SIZES, bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]), where=st.integers(0, 10**6))
    def check(bad, where, **case):
        logits, boxes, targets = make_case(**case)
        poisoned = [logits, boxes][where % 2]
        poisoned.view(-1)[where % poisoned.numel()] = bad
        try:
            losses = criterion({"pred_logits": logits, "pred_boxes": boxes}, targets)
        except FloatingPointError as error:
            assert "image" in str(error)
            outcomes["refused, naming the image"] += 1
        else:
            # No object of its image looks at this value: it is a box that nothing depends on, or shows in the losses,
            # where the trainer stops.
            layer_size = poisoned[0].numel()
            image = where % poisoned.numel() % layer_size // (layer_size // case["images"])
            unseen = poisoned is boxes and not len(targets[image]["labels"])
            infinite_logit = poisoned is logits
            assert unseen or infinite_logit or not torch.stack(list(losses.values())).isfinite().all()
            outcomes["not looked at, or seen in the loss"] += 1

    check()


def test_losses_and_gradients_are_finite(outcomes):
    criterion = SetCriterion(HungarianMatcher())

    @given(**SIZES)
    def check(**case):
        logits, boxes, targets = make_case(**case)
        logits.requires_grad_(), boxes.requires_grad_()
        losses = criterion({"pred_logits": logits, "pred_boxes": boxes}, targets)
        sum(losses.values()).backward()
        # Sums of huge logits cancel up to rounding.
        rounding = 1e-6 * (1 + logits.detach().abs().sum())
        for name, loss in losses.items():
            assert loss.isfinite() and loss >= -rounding, name
        assert logits.grad.isfinite().all() and boxes.grad.isfinite().all()
        outcomes["finite"] += 1

    check()


def test_losses_do_not_depend_on_the_order_of_queries_or_objects(outcomes):
    criterion = SetCriterion(HungarianMatcher())

    @given(**{**SIZES, "scale": st.sampled_from([1.0, 5.0])})
    def check(**case):
        logits, boxes, targets = make_case(**case)
        losses = criterion({"pred_logits": logits, "pred_boxes": boxes}, targets)
        generator = torch.Generator().manual_seed(case["seed"])
        order = torch.randperm(case["queries"], generator=generator)
        shuffled = [
            {
                key: values[torch.randperm(len(t["labels"]), generator=generator.manual_seed(1))]
                for key, values in t.items()
            }
            for t in targets
        ]
        again = criterion({"pred_logits": logits[:, :, order], "pred_boxes": boxes[:, :, order]}, shuffled)
        for name, loss in losses.items():
            torch.testing.assert_close(again[name], loss, rtol=1e-4, atol=1e-5)
        outcomes["the same"] += 1

    check()


def test_boxes_stay_in_range_and_survive_the_way_there_and_back(outcomes):
    numbers = st.floats(0, 1, width=32)

    @given(
        box=st.tuples(numbers, numbers, numbers, numbers),
        deltas=st.tuples(*[st.floats(-1e30, 1e30)] * 4),
        sides=st.sampled_from([2, 4]),
    )
    def check(box, deltas, sides):
        reference = torch.tensor(box)[None, None]
        moved = apply_box_deltas(torch.tensor(deltas)[None, None], reference[..., :sides])
        assert ((moved >= 0) & (moved <= 1)).all()
        inside = reference.clamp(1e-4, 1 - 1e-4)
        torch.testing.assert_close(inverse_sigmoid(inside).sigmoid(), inside, rtol=0, atol=1e-6)
        torch.testing.assert_close(apply_box_deltas(torch.zeros(1, 1, 4), inside), inside, rtol=0, atol=1e-6)
        back = box_convert(box_convert(reference, "cxcywh", "xyxy"), "xyxy", "cxcywh")
        torch.testing.assert_close(back, reference, rtol=0, atol=1e-6)
        outcomes["in range"] += 1

    check()


@pytest.mark.parametrize("kind", ["decoder", "two-stage"])
def test_every_loss_is_there_whatever_the_ground_truth(kind, outcomes):
    criterion = SetCriterion(HungarianMatcher())

    @given(**SIZES, cells=st.integers(1, 40))
    def check(cells, **case):
        logits, boxes, targets = make_case(**case)
        outputs = {"pred_logits": logits, "pred_boxes": boxes}
        suffixes = {"", "_0"}
        if kind == "two-stage":
            enc_logits, enc_boxes, _ = make_case(**{**case, "queries": cells}, layers=1)
            outputs |= {"enc_logits": enc_logits[0], "enc_boxes": enc_boxes[0]}
            suffixes.add("_enc")
        losses = criterion(outputs, targets)
        assert losses.keys() == {f"loss_{name}{suffix}" for name in ("ce", "bbox", "giou") for suffix in suffixes}
        outcomes["complete"] += 1

    check()
