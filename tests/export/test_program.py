"""The exported function equals the model, before any format is involved."""

import copy

import pytest
import torch

from deformable_detr.export import DetectionProgram, InputShape
from deformable_detr.export.agreement import pad_images

VARIANTS = ("", "_box_refine", "_two_stage", "_single_scale", "_single_scale_dc5", "detr_R_50")
SIZES = ((70, 93), (96, 64))


def noise(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)


def padded_batch(canvas=(96, 93)):
    return pad_images([noise(size, i).permute(1, 2, 0).numpy() for i, size in enumerate(SIZES)], canvas)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_program_detects_what_the_model_detects(variant, tiny_model):
    model = tiny_model(variant).model
    originals = [{"height": 700, "width": 930}, {"height": 48, "width": 32}]
    inputs = [{"image": noise(size, i), **originals[i]} for i, size in enumerate(SIZES)]
    results = DetectionProgram(model)(*padded_batch())
    for inference, original, boxes, scores, labels in zip(model(inputs), originals, *results, strict=True):
        instances = inference["instances"]
        size = torch.tensor([original["width"], original["height"]] * 2)
        torch.testing.assert_close(boxes * size, instances.pred_boxes.tensor, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(scores, instances.scores)
        assert torch.equal(labels, instances.pred_classes)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(tiny_model):
    program = DetectionProgram(tiny_model().model)
    images, image_sizes = padded_batch()
    expected = program(images, image_sizes)
    for image, (height, width) in zip(images, image_sizes.tolist(), strict=True):
        image[:, height:], image[:, :, width:] = 255, 77
    torch.testing.assert_close(program(images, image_sizes), expected, rtol=0, atol=0)


@torch.no_grad()
def test_the_input_is_rgb_also_for_a_model_that_was_trained_on_bgr(tiny_model, monkeypatch):
    program = DetectionProgram(tiny_model("", "INPUT.FORMAT", "BGR").model)
    images, image_sizes = padded_batch()
    swapped = program(images.flip(1), image_sizes)
    monkeypatch.setattr(program.model, "input_format", "RGB")
    torch.testing.assert_close(swapped, program(images, image_sizes), rtol=0, atol=0)


def targets(program):
    return {str(node.target) for node in program.graph.nodes}


@pytest.mark.parametrize("variant", ["_single_scale", "_two_stage"])
@torch.no_grad()
def test_a_captured_program_takes_other_batches_and_sizes(short_model, capture, variant):
    program = DetectionProgram(short_model(variant).model)
    run = capture(program, InputShape(), decompose=True).module()
    for canvas in ((96, 93), (131, 98), (96, 200)):
        images, image_sizes = padded_batch(canvas)
        expected = program(images, image_sizes)
        torch.testing.assert_close(run(images, image_sizes), expected, rtol=1e-5, atol=1e-5)
        alone = program(images[:1], image_sizes[:1])
        torch.testing.assert_close(run(images[:1], image_sizes[:1]), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("decompose", "batch", "op"),
    [(True, 1, "aten.grid_sampler.default"), (False, 2, "deformable_detr.ms_deform_attn.default")],
)
@torch.no_grad()
def test_a_program_samples_by_the_op_that_was_asked_for(decompose, batch, op, short_model, capture):
    program = DetectionProgram(short_model("_two_stage").model)
    captured = capture(program, InputShape(batch, (64, 96)), decompose=decompose)
    ours = {target for target in targets(captured) if "deformable_detr" in target}
    assert op in targets(captured) and ours <= {op}
    images = [noise(size, i).permute(1, 2, 0).numpy() for i, size in enumerate(((64, 80), (50, 96)))]
    arguments = pad_images(images[:batch], (64, 96))
    torch.testing.assert_close(captured.module()(*arguments), program(*arguments), rtol=1e-5, atol=1e-5)


def test_a_size_that_the_model_takes_for_a_constant_is_named(short_model, capture):
    program = DetectionProgram(copy.deepcopy(short_model("_single_scale").model))
    program.model.backbone.register_forward_pre_hook(lambda _, inputs: int(inputs[0].shape[0]) and None)
    message = "cannot be exported for batch x 3 x 64 x 96: something in it, such as its backbone, may take a size for a"
    with pytest.raises(ValueError, match=message):
        capture(program, InputShape(None, (64, 96)), decompose=False)
