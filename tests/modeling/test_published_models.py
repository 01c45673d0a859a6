"""Tiny models with the switches of H-DETR and DINO do all that the models without them do."""

import copy
from contextlib import nullcontext

import pytest
import torch

from deformable_detr import prepare_for_inference
from deformable_detr.benchmark.launches import count_launches
from deformable_detr.explain.recorder import record
from deformable_detr.modeling import detector as room
from deformable_detr.solver import ClippedAdamW, get_param_groups
from deformable_detr.training.ema import ModelEMA
from deformable_detr.training.per_layer_ap import EveryLayer

H_DETR = {
    "two_stage": True,
    "with_box_refine": True,
    "mixed_query_selection": True,
    "look_forward_twice": True,
    "num_one2many_queries": 9,
}
DINO = H_DETR | {
    "anchor_query_pos": True,
    "multiclass_proposals": True,
    "decoder_norm": True,
    "shared_heads": True,
    "inverse_sigmoid_eps": 1e-3,
    "num_one2many_queries": 0,
    "denoising": {"dn_number": 6, "inverse_sigmoid_eps": 1e-3},
}
VARIANTS = {
    "h_detr": H_DETR,
    "dino": DINO,
    "one_stage": {"with_box_refine": True, "look_forward_twice": True, "decoder_norm": True, "shared_heads": True},
}
# Largest difference of a score to float32; about three times what was measured.
SCORE_BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float64: 1e-6}


@pytest.fixture(params=VARIANTS)
def build(request, make_model, randomize):
    """Build the variant with random weights, and further options."""
    return lambda **options: randomize(make_model(**VARIANTS[request.param], **options))


@pytest.fixture
def images(make_input):
    """Two sizes, so that there is padding."""
    first = make_input(128, 96, [[10, 20, 70, 100], [40, 5, 90, 60]], [1, 3])
    return [first, make_input(60, 64, [[5, 5, 40, 50]], [4], seed=1)]


def train_step(model, images, dtype=None):
    """Losses and gradients of one step with the same random numbers, under autocast to ``dtype``."""
    torch.manual_seed(3)
    model.train().zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        losses = model(images)
    sum(losses.values()).backward()
    return losses | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_checkpointing_and_ready_weights_change_no_loss_and_no_gradient(build, images, dtype, monkeypatch):
    expected = train_step(build(dropout=0.3), images, dtype)
    assert all(value.isfinite().all() for value in expected.values())
    checkpointed = train_step(build(dropout=0.3, activation_checkpoint=True), images, dtype)
    monkeypatch.setattr(room, "ready_weights", lambda model: nullcontext())
    one_by_one = train_step(build(dropout=0.3), images, dtype)
    for name, value in expected.items():
        assert torch.equal(value, checkpointed[name]) and torch.equal(value, one_by_one[name]), name


@pytest.mark.parametrize("dtype", SCORE_BOUNDS, ids=str)
def test_models_of_other_types_train_and_detect_as_in_float32(build, images, dtype):
    model = build().eval()
    with torch.no_grad():
        expected = [result["instances"].scores for result in model(images)]
        converted = copy.deepcopy(model).to(dtype)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float64):
            mixed = model(images)
        for results in (converted(images), prepare_for_inference(model, dtype=dtype)(images), mixed):
            found = [result["instances"].scores for result in results]
            torch.testing.assert_close(found, expected, rtol=0, atol=SCORE_BOUNDS[dtype])
    step = train_step(converted, images)
    assert all(value.isfinite().all() for value in step.values())
    wide = torch.promote_types(dtype, torch.float32)
    assert {value.dtype for name, value in step.items() if name.startswith("loss")} == {wide}
    assert {value.dtype for name, value in converted.predict_raw(images).items() if "boxes" in name} == {wide}


@torch.no_grad()
def test_prepared_models_detect_the_same(build, images):
    model = build().eval()
    for result, expected in zip(prepare_for_inference(model)(images), model(images), strict=True):
        found, wanted = result["instances"], expected["instances"]
        torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=0, atol=1e-3)


def test_every_parameter_is_optimised_once_and_shared_ones_stay_shared_in_the_average(build, images):
    model = build()
    groups = get_param_groups(model, base_lr=1e-2, weight_decay=1e-4)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    average = ModelEMA(model, decay=0.5)
    average.update(model)
    train_step(model, images)
    before = model.bbox_embed[0].layers[-1].bias.detach().clone()
    ClippedAdamW(groups, lr=1e-2).step()
    average.update(model)
    after = model.bbox_embed[0].layers[-1].bias
    # At first the average keeps less: (1 + 1) / (10 + 1).
    torch.testing.assert_close(average.model.bbox_embed[0].layers[-1].bias, before * 2 / 11 + after * 9 / 11)
    for ours, theirs in ((model.bbox_embed, average.model.bbox_embed), (model.class_embed, average.model.class_embed)):
        assert [head is ours[0] for head in ours] == [head is theirs[0] for head in theirs]


@torch.no_grad()
def test_every_layer_is_evaluated_and_explained(build, images):
    model = build().eval()
    outputs, recordings = model.predict_raw(images), record(model, images)
    for index, recording in enumerate(recordings):
        assert torch.equal(recording.pred_boxes, outputs["pred_boxes"][:, index])
        assert torch.equal(recording.pred_logits, outputs["pred_logits"][:, index])
    by_layer, last = EveryLayer(model)(images), model(images)
    assert len(by_layer) == 3
    assert torch.equal(by_layer[-1][0]["instances"].scores, last[0]["instances"].scores)


@torch.no_grad()
def test_h_detr_detects_with_the_operations_of_two_stage(make_model, images):
    """What it has in training alone costs nothing afterwards.

    One copy is allowed: of contents that all images share.
    """
    models = [make_model(two_stage=True, with_box_refine=True).eval(), make_model(**H_DETR).eval()]
    for model in models:
        model(images)  # The first time it computes what is kept for sizes.
    two_stage, h_detr = (count_launches(lambda model=model: model(images), model) for model in models)
    assert (h_detr - two_stage).total() <= 1 and not two_stage - h_detr
