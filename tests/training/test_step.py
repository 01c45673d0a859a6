"""Forward and backward of a batch: accumulation and precision."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from deformable_detr.training.precision import Precision
from deformable_detr.training.settings import TrainingSettings
from deformable_detr.training.step import Step

from .conftest import build_tiny, make_batch

FLOAT32 = Precision("cpu")


# Denoising of a batch depends on its random numbers, and on the image with most objects.
DENOISING = {"DN_NUMBER": 6, "DN_LABEL_NOISE_RATIO": 0.0, "DN_BOX_NOISE_SCALE": 0.0}
FURTHER_QUERIES = [f"MODEL.DEFORMABLE_DETR.{key} {value}" for key, value in DENOISING.items()]
FURTHER_QUERIES += ["MODEL.DEFORMABLE_DETR.NUM_ONE2MANY_QUERIES 30"]


def run_step(model, batch, *, parts=1, precision=FLOAT32):
    model.zero_grad()
    losses = Step(batch, 0, 0, accumulation_steps=parts).backward(model, precision)
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(model_and_batch, parts):
    """Also where the parts have different numbers of images and objects, and one has no object at all."""
    assert_parts_add_up(*model_and_batch, parts)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_of_further_queries_are_those_of_the_whole_batch(tiny_yaml, parts):
    opts = [part for pair in FURTHER_QUERIES for part in pair.split()]
    model = build_tiny(tiny_yaml("_two_stage"), *opts)
    assert_parts_add_up(model, make_batch(3, 1, 3, 0) if parts == 2 else make_batch(2, 2, 2, 2), parts)


def assert_parts_add_up(model, batch, parts):
    with EventStorage() as whole:
        losses, gradients = run_step(model, batch)
    with EventStorage() as logged:
        part_losses, part_gradients = run_step(model, batch, parts=parts)
    for name in ("class_error", "cardinality_error"):
        ((mean, _),) = logged.history(name).values()
        assert mean == pytest.approx(whole.latest()[name][0], rel=1e-6), name
    for name, loss in losses.items():
        assert part_losses[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    assert part_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # Convolutions of one image round otherwise than those of four.
        assert (part_gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


def test_batch_cannot_have_more_parts_than_images(model_and_batch):
    model, batch = model_and_batch
    with pytest.raises(ValueError, match="ACCUMULATION_STEPS is 5, but the batch of a process has 4 images"):
        run_step(model, batch, parts=5)


def test_random_numbers_of_a_step_depend_on_its_number_and_not_on_the_past(model_and_batch):
    model, batch = model_and_batch
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    first, _ = run_step(model, batch)
    torch.rand(7)
    again, _ = run_step(model, batch)
    assert first == again
    model.zero_grad()
    assert Step(batch, 1, 0).backward(model, FLOAT32) != first
    assert Step(batch, 0, 0, rank=1).backward(model, FLOAT32) != first


@pytest.mark.parametrize("name, bound", [("bfloat16", 0.05), ("float16", 0.01)])
def test_mixed_precision_stays_close_to_float32(model_and_batch, name, bound):
    model, batch = model_and_batch
    precision = Precision.of(TrainingSettings(output_dir="", amp_enabled=True, amp_precision=name), model)
    losses, gradients = run_step(model, batch)
    low_losses, low_gradients = run_step(model, batch, precision=precision)
    assert all(value.dtype == torch.float32 for value in low_gradients.values())
    total, low_total = (sum(x.values()).item() for x in (losses, low_losses))
    assert low_total != total
    assert low_total == pytest.approx(total, rel=bound)


def test_unknown_precision_is_named(model_and_batch):
    settings = TrainingSettings(output_dir="", amp_enabled=True, amp_precision="fp8")
    with pytest.raises(ValueError, match=r"SOLVER\.AMP\.PRECISION must be one of .*'bfloat16', 'float16'.*got 'fp8'"):
        Precision.of(settings, model_and_batch[0])


def test_precision_that_the_device_lacks_is_explained(model_and_batch, monkeypatch):
    def lack(*_, **__):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.Conv2d, "forward", lack)
    settings = TrainingSettings(output_dir="", amp_enabled=True, amp_precision="float16")
    with pytest.raises(ValueError, match="float16 does not work on this cpu .*not implemented for 'Half'.*bfloat16"):
        Precision.of(settings, model_and_batch[0])


def test_loss_is_scaled_in_float16_only():
    assert Precision("cpu", torch.float16).grad_scaler().is_enabled()
    assert not Precision("cpu", torch.bfloat16).grad_scaler().is_enabled()
    assert not FLOAT32.grad_scaler().is_enabled()
