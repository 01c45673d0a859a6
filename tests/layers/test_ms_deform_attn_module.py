"""The module MSDeformAttn and the official-style MSDeformAttnFunction."""

import sys

import pytest
import torch

from deformable_detr.layers import MSDeformAttn, MSDeformAttnFunction, ms_deform_attn

SHAPES = [(4, 6), (2, 3)]
S = 30


@pytest.fixture
def attention() -> MSDeformAttn:
    torch.manual_seed(0)
    module = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
    with torch.no_grad():
        module.sampling_offsets.weight.normal_(std=0.1)
        module.attention_weights.weight.normal_(std=0.1)
        module.value_proj.bias.normal_()
    return module


def inputs(last: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query (2, 5, 32), reference_points (2, 5, 2, last), value (2, 30, 32)."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 5, 32, generator=generator),
        torch.rand(2, 5, 2, last, generator=generator) * 0.5 + 0.25,
        torch.randn(2, S, 32, generator=generator),
    )


def test_parameters_have_the_official_names_and_shapes():
    shapes = {name: tuple(parameter.shape) for name, parameter in MSDeformAttn().named_parameters()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }


def test_heads_start_looking_in_eight_directions_and_points_at_growing_distance():
    attention = MSDeformAttn()
    ring = attention.sampling_offsets.bias.view(8, 4, 4, 2)
    directions = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
    distances = torch.arange(1, 5).view(4, 1)
    torch.testing.assert_close(ring, (directions.view(8, 1, 1, 2) * distances).expand(8, 4, 4, 2).float())
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any() and not attention.attention_weights.bias.any()
    assert not attention.value_proj.bias.any() and not attention.output_proj.bias.any()
    assert attention.value_proj.weight.abs().max() <= (6 / 512) ** 0.5


def test_fresh_module_averages_over_its_points():
    """With uniform weights and constant features the sum over L * P points is the projected feature itself."""
    attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=2)
    shapes = [(9, 9), (9, 9)]
    feature = torch.randn(32)
    output = attention(torch.randn(1, 3, 32), torch.full((1, 3, 2, 2), 0.5), feature.expand(1, 162, 32), shapes)
    expected = attention.output_proj(attention.value_proj(feature))
    torch.testing.assert_close(output, expected.expand(1, 3, 32))


@pytest.mark.parametrize("last", [2, 4])
def test_output_follows_the_definition(attention, last):
    """Joint softmax over levels and points; offsets in pixels around points, in half boxes / P around boxes."""
    query, reference_points, value = inputs(last)
    offsets = attention.sampling_offsets(query).view(2, 5, 4, 2, 3, 2)
    if last == 2:
        scale = torch.tensor([[1 / 6, 1 / 4], [1 / 3, 1 / 2]]).view(1, 1, 1, 2, 1, 2)
    else:
        scale = reference_points[:, :, None, :, None, 2:] * 0.5 / 3
    locations = reference_points[:, :, None, :, None, :2] + offsets * scale
    weights = attention.attention_weights(query).view(2, 5, 4, 6).softmax(-1).view(2, 5, 4, 2, 3)
    attended = ms_deform_attn(attention.value_proj(value).view(2, S, 4, 8), SHAPES, locations, weights)
    actual = attention(query, reference_points, value, SHAPES)
    torch.testing.assert_close(actual, attention.output_proj(attended))


def test_padding_counts_as_zero_after_the_projection(attention):
    query, reference_points, value = inputs()
    mask = torch.rand(2, S, generator=torch.Generator().manual_seed(2)) < 0.5
    output = attention(query, reference_points, value, SHAPES, mask)
    garbage = value.masked_fill(mask[..., None], 1e6)
    assert torch.equal(output, attention(query, reference_points, garbage, SHAPES, mask))
    everything = attention(query, reference_points, value, SHAPES, torch.ones_like(mask))
    torch.testing.assert_close(everything, attention.output_proj.bias.expand_as(everything))


def test_shapes_as_tensor_and_as_pairs_agree(attention):
    query, reference_points, value = inputs()
    expected = attention(query, reference_points, value, SHAPES)
    assert torch.equal(attention(query, reference_points, value, torch.tensor(SHAPES)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_locations_and_weights_in_float32(attention, dtype, monkeypatch):
    seen = []

    def spy(value, shapes, locations, weights):
        seen.append((value.dtype, locations.dtype, weights.dtype))
        return ms_deform_attn(value, shapes, locations, weights)

    # By its module: the package has a function of that name.
    monkeypatch.setattr(sys.modules[MSDeformAttn.__module__], "ms_deform_attn", spy)
    expected = attention(*inputs(), SHAPES)
    with torch.autocast("cpu", dtype):
        output = attention(*inputs(), SHAPES)
    assert seen[1] == (dtype, torch.float32, torch.float32) and output.dtype == dtype
    assert (output.float() - expected).norm() / expected.norm() < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_model_in_half_precision_works(attention):
    output = attention.bfloat16()(*(x.bfloat16() for x in inputs()), SHAPES)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_training_works_after_inference_mode(attention):
    """What the first call keeps for later calls must not be an inference tensor."""
    with torch.inference_mode():
        attention(*inputs(), [(5, 4), (5, 2)])
    attention(*inputs(), [(5, 4), (5, 2)]).sum().backward()
    assert attention.sampling_offsets.weight.grad.any()


def test_gradients_reach_all_parameters_and_inputs(attention):
    tensors = [x.requires_grad_() for x in inputs(4)]
    attention(*tensors, SHAPES).square().sum().backward()
    for tensor in (*tensors, *attention.parameters()):
        assert tensor.grad is not None and tensor.grad.any()


def test_heads_that_do_not_divide_the_model_are_refused():
    with pytest.raises(ValueError, match=r"d_model \(260\) must be divisible by n_heads \(8\)"):
        MSDeformAttn(d_model=260, n_heads=8)


def test_wrong_reference_points_are_refused(attention):
    query, reference_points, value = inputs()
    with pytest.raises(ValueError, match=r"reference_points must be \(N, Lq, 2, 2 or 4\), got \(2, 5, 2, 3\)"):
        attention(query, torch.rand(2, 5, 2, 3), value, SHAPES)
    with pytest.raises(ValueError, match=r"reference_points must be \(N, Lq, 2, 2 or 4\), got \(2, 5, 1, 2\)"):
        attention(query, reference_points[:, :, :1], value, SHAPES)


def test_wrong_number_of_levels_is_refused(attention):
    with pytest.raises(ValueError, match=r"spatial_shapes must hold n_levels \(2\) pairs, got \[\(5, 6\)\]"):
        attention(*inputs(), [(5, 6)])


# ---- MSDeformAttnFunction ------------------------------------------------------------------------------------


def official_arguments(case):
    starts = [sum(h * w for h, w in case.spatial_shapes[:level]) for level in range(len(case.spatial_shapes))]
    device = case.value.device
    return torch.tensor(case.spatial_shapes, device=device), torch.tensor(starts, device=device)


@pytest.mark.parametrize("im2col_step", [1, 64])
def test_official_signature_gives_the_same_result_for_any_batch_size(make_case, im2col_step):
    case = make_case(N=67, Lq=2).with_grad()
    output = MSDeformAttnFunction.apply(case.value, *official_arguments(case), *case.tensors[1:], im2col_step)
    assert torch.equal(output, ms_deform_attn(*case.args))
    output.sum().backward()
    assert all(tensor.grad is not None for tensor in case.tensors)


@pytest.mark.parametrize("inference", [False, True])
def test_official_signature_notices_shapes_that_change_in_place(make_case, inference):
    case = make_case(shapes=((6, 4), (3, 4)))
    with torch.inference_mode(inference):
        shapes, starts = official_arguments(case)
        first = MSDeformAttnFunction.apply(case.value, shapes, starts, *case.tensors[1:], 64)
        shapes[0] = torch.tensor([4, 6])
        second = MSDeformAttnFunction.apply(case.value, shapes, starts, *case.tensors[1:], 64)
    assert torch.equal(first, ms_deform_attn(*case.args))
    assert torch.equal(second, ms_deform_attn(case.value, [(4, 6), (3, 4)], *case.tensors[1:]))


def test_official_signature_refuses_starts_that_are_no_running_sum(make_case):
    case = make_case()
    shapes, starts = official_arguments(case)
    with pytest.raises(ValueError, match=r"level_start_index must be \[0, 35, 47\] .* got \[0, 36, 48\]"):
        MSDeformAttnFunction.apply(case.value, shapes, starts + (starts > 0), *case.tensors[1:], 64)
