import math

import pytest
import torch

from deformable_detr.modeling import HungarianMatcher, SetCriterion


def target(labels, boxes):
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": torch.tensor(boxes).reshape(-1, 4)}


def random_outputs(layers=3, images=2, queries=6, classes=4, cells=9, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    return {
        "pred_logits": rand(layers, images, queries, classes) * 4 - 2,
        "pred_boxes": rand(layers, images, queries, 4) * 0.4 + 0.3,
        "enc_logits": rand(images, cells, classes) * 4 - 2,
        "enc_boxes": rand(images, cells, 4) * 0.4 + 0.3,
    }


TARGETS = [target([1, 3], [[0.5, 0.5, 0.2, 0.3], [0.4, 0.6, 0.3, 0.1]]), target([2], [[0.3, 0.3, 0.2, 0.2]])]


def test_losses_equal_hand_computed_numbers():
    # Two queries, one class, one object: query 0 (p = 0.75) is near the object and matches, query 1 has p = 0.5.
    outputs = {
        "pred_logits": torch.tensor([[[[math.log(3.0)], [0.0]]]]),
        "pred_boxes": torch.tensor([[[[0.6, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]]]),
    }
    losses = SetCriterion(HungarianMatcher())(outputs, [target([0], [[0.5, 0.5, 0.2, 0.2]])])
    positive = 0.25 * 0.25**2 * -math.log(0.75)
    negative = 0.75 * 0.5**2 * -math.log(0.5)
    assert losses["loss_ce"].item() == pytest.approx(2 * (positive + negative), abs=1e-6)
    assert losses["loss_bbox"].item() == pytest.approx(5 * 0.1, abs=1e-6)
    assert losses["loss_giou"].item() == pytest.approx(2 * (1 - 1 / 3), abs=1e-5)


def test_every_layer_gets_the_losses_it_would_get_alone():
    outputs = random_outputs()
    criterion = SetCriterion(HungarianMatcher())
    losses = criterion({k: outputs[k] for k in ("pred_logits", "pred_boxes")}, TARGETS)
    assert set(losses) == {f"loss_{n}{s}" for n in ("ce", "bbox", "giou") for s in ("", "_0", "_1")}
    for layer, suffix in enumerate(("_0", "_1", "")):
        alone = {k: outputs[k][layer : layer + 1] for k in ("pred_logits", "pred_boxes")}
        for name, value in criterion(alone, TARGETS).items():
            torch.testing.assert_close(losses[name + suffix], value)


def test_encoder_proposals_are_supervised_as_class_zero():
    outputs = random_outputs()
    criterion = SetCriterion(HungarianMatcher())
    losses = criterion(outputs, TARGETS)
    as_layer = {"pred_logits": outputs["enc_logits"][None], "pred_boxes": outputs["enc_boxes"][None]}
    agnostic = [{"labels": torch.zeros_like(t["labels"]), "boxes": t["boxes"]} for t in TARGETS]
    for name, value in criterion(as_layer, agnostic).items():
        torch.testing.assert_close(losses[f"{name}_enc"], value)


def test_without_auxiliary_losses_the_encoder_is_still_trained():
    losses = SetCriterion(HungarianMatcher(), aux_loss=False)(random_outputs(), TARGETS)
    assert set(losses) == {f"loss_{n}{s}" for n in ("ce", "bbox", "giou") for s in ("", "_enc")}


def test_losses_are_normalised_by_the_number_of_objects():
    outputs = random_outputs(layers=1, images=1)
    criterion = SetCriterion(HungarianMatcher())
    one = criterion(outputs, TARGETS[:1])
    doubled = {k: torch.cat((v, v), dim=0 if k.startswith("enc") else 1) for k, v in outputs.items()}
    two = criterion(doubled, TARGETS[:1] * 2)
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_a_batch_without_objects_has_finite_losses_and_gradients_everywhere():
    outputs = {k: v.requires_grad_() for k, v in random_outputs().items()}
    losses = SetCriterion(HungarianMatcher())(outputs, [target([], [])] * 2)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert losses["loss_bbox"] == 0 and losses["loss_giou"] == 0 and losses["loss_ce"] > 0
    assert all(v.grad is not None and v.grad.isfinite().all() for v in outputs.values())


def test_half_precision_predictions_give_float32_losses():
    outputs = {k: v.bfloat16() for k, v in random_outputs().items()}
    losses = SetCriterion(HungarianMatcher())(outputs, TARGETS)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())


def test_focal_loss_without_focusing_is_half_the_binary_cross_entropy():
    outputs = random_outputs(layers=1)
    criterion = SetCriterion(HungarianMatcher(), focal_alpha=0.5, focal_gamma=0.0, class_weight=1.0)
    loss = criterion(outputs, TARGETS)["loss_ce"]
    logits = outputs["pred_logits"][0]
    one_hot = torch.zeros_like(logits)
    for image, (rows, columns) in enumerate(criterion.matcher(logits, outputs["pred_boxes"][0], TARGETS)):
        one_hot[image, rows, TARGETS[image]["labels"][columns]] = 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum") / 2 / 3
    torch.testing.assert_close(loss, expected)
