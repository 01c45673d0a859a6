"""Training under autocast, against float32. The bounds are about three times what was measured."""

import importlib

import pytest
import torch

# The package exports a function of the same name.
ms_deform_attn_room = importlib.import_module("deformable_detr.layers.ms_deform_attn")

ONE_LEVEL = {"levels": 1, "in_features": ("res5",)}
VARIANTS = {
    "single_scale": ONE_LEVEL,
    # One level of half the stride is what dilation makes of it.
    "single_scale_dc5": ONE_LEVEL | {"in_features": ("res4",)},
    "base": {},
    "box_refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}


LOW = [torch.bfloat16, torch.float16]
# Largest relative difference of any loss (of losses below 1: absolute), of all gradients, and of a score.
BOUNDS = {torch.bfloat16: (1e-2, 0.1, 1e-2), torch.float16: (1e-3, 0.03, 1e-3)}
# Rounding changes which proposals are selected and matched.
TWO_STAGE_GRADIENT_BOUNDS = {torch.bfloat16: 0.4, torch.float16: 0.05}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture
def model(make_model, randomize, variant):
    # Random weights: a fresh model samples exactly between pixels, where gradients of locations jump.
    return randomize(make_model(**variant))


@pytest.fixture
def images(make_input):
    """Two sizes, so that there is padding: more than half of the second image."""
    first = make_input(128, 96, [[10, 20, 70, 100], [40, 5, 90, 60]], [1, 3])
    return [first, make_input(60, 64, [[5, 5, 40, 50]], [4], seed=1)]


def train_step(model, images, dtype):
    """Losses, and all gradients as one vector."""
    model.train().zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        losses = model(images)
    sum(losses.values()).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return losses, torch.cat(gradients)


@pytest.mark.parametrize("dtype", LOW)
def test_losses_and_gradients_are_close_to_those_of_float32(model, variant, images, dtype):
    expected_losses, expected_gradients = train_step(model, images, torch.float32)
    losses, gradients = train_step(model, images, dtype)
    loss_bound, gradient_bound, _ = BOUNDS[dtype]
    if variant.get("two_stage"):
        gradient_bound = TWO_STAGE_GRADIENT_BOUNDS[dtype]
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert abs(loss - expected_losses[name]) < loss_bound * max(1, expected_losses[name]), name
    assert gradients.dtype == torch.float32 and gradients.isfinite().all()
    assert (gradients - expected_gradients).norm() < gradient_bound * expected_gradients.norm()


@pytest.mark.parametrize("dtype", LOW)
def test_detections_are_close_to_those_of_float32(model, images, dtype):
    model.eval()
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", dtype=dtype):
            results = model(images)
    for result, reference in zip(results, expected, strict=True):
        scores = result["instances"].scores
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, reference["instances"].scores, rtol=0, atol=BOUNDS[dtype][2])


def test_no_module_returns_nan_or_infinity_at_padded_cells_in_float16(model, images):
    halves = []

    def check(name):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor):
                assert output.isfinite().all(), name
                halves.append(output.dtype == torch.float16)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(check(name))
    with torch.autocast("cpu", dtype=torch.float16):
        model.train()(images)
    assert any(halves)


@pytest.mark.parametrize("dtype", LOW)
def test_locations_and_weights_stay_float32_and_values_do_not(model, images, dtype, monkeypatch):
    seen = set()
    attend = ms_deform_attn_room.ms_deform_attn

    def record(value, spatial_shapes, locations, weights):
        seen.add((value.dtype, locations.dtype, weights.dtype))
        return attend(value, spatial_shapes, locations, weights)

    monkeypatch.setattr(ms_deform_attn_room, "ms_deform_attn", record)
    with torch.autocast("cpu", dtype=dtype):
        losses = model.train()(images)
    assert seen == {(dtype, torch.float32, torch.float32)} and losses


@pytest.mark.parametrize("dtype", LOW)
def test_boxes_and_references_stay_float32(model, images, dtype):
    with torch.autocast("cpu", dtype=dtype):
        outputs = model.predict_raw(images)
    dtypes = {name: value.dtype for name, value in outputs.items()}
    assert {name: torch.float32 if "boxes" in name else dtype for name in dtypes} == dtypes
