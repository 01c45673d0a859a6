"""Models whose weights are float16, bfloat16 or float64 themselves, without autocast."""

import pytest
import torch

VARIANTS = {
    "base": {},
    "box_refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}
# Largest difference of a score to float32; about three times what was measured.
SCORE_BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float64: 1e-6}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=VARIANTS)
def model(request, make_model, randomize):
    return randomize(make_model(num_encoder_layers=2, **VARIANTS[request.param]))


@pytest.fixture
def images(make_input):
    """Two sizes, so that there is padding."""
    first = make_input(128, 96, [[10, 20, 70, 100], [40, 5, 90, 60]], [1, 3])
    return [first, make_input(60, 64, [[5, 5, 40, 50]], [4], seed=1)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", SCORE_BOUNDS, ids=str)
@torch.no_grad()
def test_detections_are_close_to_those_of_float32(model, images, dtype, device):
    model.eval().to(device)
    expected = model(images)
    for result, reference in zip(model.to(dtype)(images), expected, strict=True):
        scores = result["instances"].scores
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, reference["instances"].scores, rtol=0, atol=SCORE_BOUNDS[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", SCORE_BOUNDS, ids=str)
def test_a_training_step_gives_every_parameter_a_finite_gradient(model, images, dtype, device):
    model.train().to(device=device, dtype=dtype)
    losses = model(images)
    sum(losses.values()).backward()
    assert {loss.dtype for loss in losses.values()} == {torch.promote_types(dtype, torch.float32)}
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", SCORE_BOUNDS, ids=str)
def test_boxes_points_and_proposals_stay_in_float32_at_least(model, images, dtype):
    seen = {}

    def look(module, args):
        seen.update(args[1]._asdict())

    model.to(dtype).transformer.register_forward_pre_hook(look)
    outputs = model.predict_raw(images)
    wide = torch.promote_types(dtype, torch.float32)
    assert {value.dtype for name, value in outputs.items() if "boxes" in name} == {wide}
    assert {value.dtype for name, value in outputs.items() if "logits" in name} == {dtype}
    points = [seen[name] for name in ("valid_sizes", "valid_ratios", "reference_points", "proposals")]
    assert {tensor.dtype for tensor in points if tensor is not None} == {wide}


def test_float64_losses_are_those_of_float64_arithmetic(make_model, make_input, randomize):
    """A central difference in one weight: float32 anywhere on the way would leave nothing of it."""
    model = randomize(make_model(with_box_refine=True)).double().train()
    images = [make_input(64, 96, [[4, 8, 40, 60]], [2])]
    weight = model.class_embed[-1].bias
    sum(model(images).values()).backward()
    losses = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            weight[2] += step
            losses.append(sum(model(images).values()))
    assert ((losses[0] - losses[1]) / 2e-6).item() == pytest.approx(weight.grad[2].item(), rel=1e-5)
