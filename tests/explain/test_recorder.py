"""What is recorded is what the operator gets, in pixels of the original image."""

import pytest
import torch

from deformable_detr.explain import record
from deformable_detr.layers import MSDeformAttn, ms_deform_attn_pytorch

from .conftest import VARIANTS


def noise(rows, columns, **original_size):
    generator = torch.Generator().manual_seed(rows * columns)
    image = torch.randint(0, 256, (3, rows, columns), generator=generator, dtype=torch.uint8)
    return {"image": image, **original_size}


def attentions(model):
    return [module for module in model.modules() if isinstance(module, MSDeformAttn)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_recording_changes_no_prediction_and_leaves_no_hook(load_tiny, variant):
    model = load_tiny(variant).model
    inputs = [noise(64, 96), noise(80, 64)]
    before = model.predict_raw(inputs)
    recordings = record(model, inputs)
    for index, recording in enumerate(recordings):
        assert torch.equal(recording.pred_logits, before["pred_logits"][:, index])
        assert torch.equal(recording.pred_boxes, before["pred_boxes"][:, index])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_samples_reproduce_what_every_layer_returns(load_tiny, variant):
    model = load_tiny(variant).model
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append((module, args[2], output)))
        for module in attentions(model.transformer)
    ]
    # Without padding, [0, 1] of the padded map is [0, 1] of the image.
    recording = record(model, [noise(64, 96)])[0]
    for hook in hooks:
        hook.remove()
    layers = [*recording.encoder, *recording.decoder]
    assert len(layers) == len(seen) == 3
    for sampling, (module, value, output) in zip(layers, seen, strict=True):
        value = module.value_proj(value).unflatten(-1, (module.n_heads, -1))
        locations = sampling.locations / torch.tensor([96.0, 64.0])
        sampled = ms_deform_attn_pytorch(value, recording.spatial_shapes, locations[None], sampling.weights[None])
        torch.testing.assert_close(module.output_proj(sampled), output)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_every_head_sum_to_one(load_tiny, variant):
    recording = record(load_tiny(variant).model, [noise(64, 96)])[0]
    for sampling in (*recording.encoder, *recording.decoder):
        totals = sampling.weights.sum((-1, -2))
        torch.testing.assert_close(totals, torch.ones_like(totals))


def test_fresh_offsets_are_whole_cells_in_pixels_of_the_original_image(load_tiny):
    """Head 0 looks to the right and head 1 down, point p at p + 1 cells; level l has 96 / 8 / 2**l columns."""
    model = load_tiny(fresh_attention=True).model
    recording = record(model, [noise(64, 96, height=640, width=480)])[0]
    assert recording.spatial_shapes == [(8, 12), (4, 6), (2, 3), (1, 2)]
    for sampling in (recording.encoder[0], recording.decoder[1]):
        offsets = sampling.locations - sampling.reference[:, None, None, None]
        for level, (rows, columns) in enumerate(recording.spatial_shapes):
            for point in range(4):
                right, down = offsets[:, 0, level, point], offsets[:, 1, level, point]
                torch.testing.assert_close(right[:, 0], torch.full_like(right[:, 0], (point + 1) * 480 / columns))
                torch.testing.assert_close(down[:, 1], torch.full_like(down[:, 1], (point + 1) * 640 / rows))
                assert right[:, 1].abs().max() < 1e-2 and down[:, 0].abs().max() < 1e-2


def test_offsets_of_boxes_are_parts_of_half_the_box(load_tiny):
    model = load_tiny("_two_stage", fresh_attention=True).model
    sampling = record(model, [noise(64, 96)])[0].decoder[0]
    right = sampling.locations[:, 0, :, 3, 0] - sampling.reference[:, None, 0]
    torch.testing.assert_close(right, sampling.reference[:, None, 2].expand_as(right) / 2)


def test_encoder_references_are_cell_centres(load_tiny):
    recording = record(load_tiny().model, [noise(64, 96, height=640, width=480)])[0]
    centres = recording.encoder[0].reference
    assert centres[[0, 1, 12, 96]].tolist() == [[20, 40], [60, 40], [20, 120], [40, 80]]


@pytest.mark.parametrize("variant", ["", "_single_scale"])
def test_padding_moves_no_point(load_tiny, variant):
    """The larger image of a batch pads the other one; sizes are whole cells of every level."""
    model = load_tiny(variant, fresh_attention=True).model
    small = noise(64, 128, height=100, width=200)
    alone = record(model, [small])[0]
    padded = record(model, [noise(192, 256), small])[1]
    assert padded.spatial_shapes[0] != alone.spatial_shapes[0]
    for one, other in zip(alone.decoder, padded.decoder, strict=True):
        torch.testing.assert_close(one.reference, other.reference)
        torch.testing.assert_close(one.locations, other.locations)
    cells = [padded.cells_at(x, y)[0] for x, y in ((1, 1), (199, 99))]
    corners = [alone.cells_at(x, y)[0] for x, y in ((1, 1), (199, 99))]
    torch.testing.assert_close(padded.encoder[0].locations[cells], alone.encoder[0].locations[corners])


def test_a_pixel_finds_the_cell_around_it_in_every_level(load_tiny):
    recording = record(load_tiny().model, [noise(64, 96), noise(60, 50, height=300, width=250)])[1]
    for x, y in ((0, 0), (249.9, 299.9), (130, 70)):
        centres = recording.encoder[0].reference[recording.cells_at(x, y)]
        cell = torch.tensor([250.0, 300.0]) / recording.valid_sizes
        assert ((centres - torch.tensor([x, y])).abs() <= cell / 2 + 1e-3).all()


def test_references_stay_without_refinement_and_follow_the_boxes_with_it(load_tiny):
    plain = record(load_tiny().model, [noise(64, 96)])[0]
    assert torch.equal(plain.decoder[0].reference, plain.decoder[1].reference)
    refined = record(load_tiny("_box_refine").model, [noise(64, 96)])[0]
    assert [layer.reference.shape[-1] for layer in refined.decoder] == [2, 4]
    x0, y0, x1, y1 = refined.boxes[0].unbind(-1)
    corners = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
    torch.testing.assert_close(refined.decoder[1].reference, corners)
