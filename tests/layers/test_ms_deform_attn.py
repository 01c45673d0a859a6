"""What ms_deform_attn returns: the op and its twin against loops over numbers, and at the edges of their domain."""

import math

import pytest
import torch

from deformable_detr.layers import ms_deform_attn, ms_deform_attn_pytorch

from .reference_ms_deform_attn import reference_ms_deform_attn

# Relative L2 error allowed against float64 on the same, already rounded, inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.to(actual.device)
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_result_equals_the_loop_reference(attend, make_case, dtype):
    case = make_case().to(dtype, torch.promote_types(dtype, torch.float32))
    output = attend(*case.args)
    assert output.dtype == dtype and output.shape == (2, 5, 12) and output.is_contiguous()
    expected = reference_ms_deform_attn(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in case.args))
    assert relative_error(output, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [1, 2, 3, 8, 16, 24, 30, 31, 32, 48, 64, 71, 128, 256, 1025])
def test_every_head_dimension_works(make_case, D, dtype):
    case = make_case(D=D, N=1).to(dtype, torch.float32)
    expected = ms_deform_attn_pytorch(*case.to(torch.float64, torch.float64).args)
    assert relative_error(ms_deform_attn(*case.args), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("N", [1, 2, 3, 65, 130])
@pytest.mark.parametrize("M", [1, 5, 8])
def test_every_batch_size_and_number_of_heads_works(make_case, N, M):
    case = make_case(N=N, M=M, Lq=3).to(torch.float32, torch.float32)
    expected = ms_deform_attn_pytorch(*case.to(torch.float64, torch.float64).args)
    assert relative_error(ms_deform_attn(*case.args), expected) < 1e-5


@pytest.mark.parametrize("L", [1, 2, 5, 8])
@pytest.mark.parametrize("P", [1, 3, 4, 16])
def test_every_number_of_levels_and_points_works(make_case, L, P):
    case = make_case(shapes=[(3 + level, 7 - level % 3) for level in range(L)], P=P, D=32)
    expected = ms_deform_attn_pytorch(*case.args)
    assert relative_error(ms_deform_attn(*case.args), expected) < 1e-12


@pytest.mark.parametrize("Lq", [1, 7, 31, 300])
def test_every_number_of_queries_works(make_case, Lq):
    case = make_case(Lq=Lq, D=32).to(torch.float32, torch.float32)
    expected = ms_deform_attn_pytorch(*case.to(torch.float64, torch.float64).args)
    assert relative_error(ms_deform_attn(*case.args), expected) < 1e-5


def test_one_query_per_pixel_works(make_case):
    """The encoder's case, through which kernels walk in tiles, with sizes that are no multiple of a tile."""
    shapes = [(19, 37), (16, 5), (1, 3)]
    S = sum(h * w for h, w in shapes)
    case = make_case(shapes=shapes, Lq=S, D=32)
    expected = ms_deform_attn_pytorch(*case.args)
    assert relative_error(ms_deform_attn(*case.args), expected) < 1e-12


def test_images_do_not_read_each_other(attend, make_case):
    """With value = image number everywhere, an image's output is its number times the weight that fell inside."""
    case = make_case(N=3, Lq=7, D=32, margin=0.0, shapes=[(9, 9), (4, 5)])
    case.value = torch.arange(3.0, device=case.value.device).view(3, 1, 1, 1).expand(3, 101, 3, 32)
    case = case.to(torch.float32, torch.float32)
    case.sampling_locations = case.sampling_locations.clamp(0.2, 0.8)
    output = attend(*case.args)
    torch.testing.assert_close(output, torch.arange(3.0, device=output.device).view(3, 1, 1).expand_as(output))


def test_centre_of_a_pixel_returns_that_pixel(attend, device):
    value = torch.arange(12.0, device=device).view(1, 12, 1, 1)
    x, y = torch.meshgrid((torch.arange(4.0) + 0.5) / 4, (torch.arange(3.0) + 0.5) / 3, indexing="xy")
    locations = torch.stack([x, y], -1).view(1, 12, 1, 1, 1, 2).to(device)
    output = attend(value, [(3, 4)], locations, torch.ones(1, 12, 1, 1, 1, device=device))
    torch.testing.assert_close(output.flatten(), torch.arange(12.0, device=device))


@pytest.mark.parametrize(
    ("x", "expected"),
    [(-1.0, 0.0), (-0.75, 0.25), (-0.25, 0.75), (0.5, 1.5), (2.25, 0.75 * 3), (2.75, 0.25 * 3), (3.0, 0.0), (9.0, 0.0)],
)
def test_samples_fade_to_zero_over_one_pixel_outside(attend, device, x, expected):
    """One row of pixels 1, 2, 3 sampled at pixel coordinate x; 0 and 3 are the last positions that count."""
    value = torch.tensor([1.0, 2.0, 3.0], device=device, dtype=torch.float64).view(1, 3, 1, 1)
    location = torch.tensor([(x + 0.5) / 3, 0.5], device=device, dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
    output = attend(value, [(1, 3)], location, torch.ones(1, 1, 1, 1, 1, device=device, dtype=torch.float64))
    assert output.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38])
def test_location_that_is_no_place_contributes_nothing(attend, make_case, bad, axis):
    case = make_case(D=32).to(torch.float32, torch.float32)
    without = attend(case.value, case.spatial_shapes, case.sampling_locations, case.attention_weights.clone())
    case.sampling_locations[0, 2, 1, 0, 1, axis] = bad
    output = attend(*case.args)
    case.sampling_locations[0, 2, 1, 0, 1] = 0.4
    case.attention_weights[0, 2, 1, 0, 1] = 0.0
    torch.testing.assert_close(output, attend(*case.args))
    assert torch.equal(output[1], without[1])


def test_pixels_that_are_not_sampled_do_not_leak(attend, device):
    """NaN and infinity beside a sample whose own corners, those inside the map, are finite."""
    value = torch.full((1, 16, 1, 32), math.nan, device=device)
    value[0, [3, 7]] = 2.0  # the last column of the first two rows of a 4 x 4 map
    value[0, 4] = math.inf  # follows pixel 3 in memory
    location = torch.tensor([3.5 + 0.25, 0.5 + 0.5], device=device).view(1, 1, 1, 1, 1, 2) / 4
    output = attend(value, [(4, 4)], location, torch.ones(1, 1, 1, 1, 1, device=device))
    torch.testing.assert_close(output, torch.full_like(output, 1.5))


def test_nan_attention_weight_propagates_to_its_query_and_head_only(attend, make_case):
    case = make_case(margin=0.0, shapes=[(9, 9)], D=32)
    case.sampling_locations = case.sampling_locations.clamp(0.2, 0.8)
    case.attention_weights[1, 3, 2, 0, 0] = math.nan
    is_nan = attend(*case.args).isnan().view(2, 5, 3, 32)
    assert is_nan[1, 3, 2].all() and is_nan.sum() == 32


@pytest.mark.parametrize("sizes", [{"N": 0}, {"Lq": 0}, {"M": 0}, {"D": 0}], ids=str)
def test_empty_input_gives_empty_output(attend, make_case, sizes):
    case = make_case(**sizes)
    N, Lq = case.sampling_locations.shape[:2]
    assert attend(*case.args).shape == (N, Lq, case.value.shape[2] * case.value.shape[3])


@pytest.mark.parametrize("sizes", [{"shapes": ()}, {"P": 0}, {"shapes": ((0, 3), (2, 0))}], ids=str)
def test_nothing_to_sample_gives_zeros(attend, make_case, sizes):
    output = attend(*make_case(**sizes).args)
    assert output.shape == (2, 5, 12) and not output.any()


def test_empty_level_changes_nothing(attend, make_case):
    case = make_case(shapes=((5, 7), (0, 4), (3, 4)))
    used = [0, 2]
    expected = attend(
        case.value,
        [case.spatial_shapes[level] for level in used],
        case.sampling_locations[:, :, :, used],
        case.attention_weights[:, :, :, used],
    )
    torch.testing.assert_close(attend(*case.args), expected)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, the last two dims swapped in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, starting one element after an aligned address."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].view(tensor.shape).copy_(tensor)


def expanded_heads(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :, :1].expand_as(tensor)


@pytest.mark.parametrize("layout", [strided, misaligned, expanded_heads])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_layout_of_value_does_not_matter(attend, make_case, layout, dtype):
    case = make_case(D=32).to(dtype, torch.float32)
    case.value = layout(case.value)
    output = attend(*case.args)
    case.value = case.value.contiguous().clone()
    if layout is misaligned and output.is_cuda:
        # Read channel by channel, where the points of an aligned row are shared out: another order of the sum.
        torch.testing.assert_close(output, attend(*case.args))
    else:
        assert torch.equal(output, attend(*case.args))


@pytest.mark.parametrize("layout", [strided, misaligned])
def test_memory_layout_of_locations_and_weights_does_not_matter(attend, make_case, layout):
    case = make_case(D=32).to(torch.float32, torch.float32)
    output = attend(*case.args)
    case.sampling_locations, case.attention_weights = layout(case.sampling_locations), layout(case.attention_weights)
    assert torch.equal(output, attend(*case.args))


def test_locations_and_weights_may_be_half_like_the_value(attend, make_case):
    case = make_case().to(torch.bfloat16, torch.bfloat16)
    expected = attend(*case.to(torch.bfloat16, torch.float32).args)
    assert torch.equal(attend(*case.args), expected)


def test_spatial_shapes_may_be_a_tensor(attend, make_case):
    case = make_case()
    shapes = torch.tensor(case.spatial_shapes, device=case.value.device)
    assert torch.equal(attend(case.value, shapes, *case.tensors[1:]), attend(*case.args))


def _replace(index, change):
    def bad(case):
        args = list(case.args)
        args[index] = change(args[index])
        return args

    return bad


@pytest.mark.parametrize(
    ("bad_args", "message"),
    [
        (_replace(0, lambda v: v.flatten(2)), r"value must be \(N, S, M, D\), got \[2, 48, 12\]"),
        (_replace(0, lambda v: v[:, 1:]), r"spatial_shapes .*5, 7, 3, 4, 1, 1.* cover 48 positions but value has S=47"),
        (_replace(0, lambda v: v[:, :, :2]), r"sampling_locations must be .* N=2, M=2 \(from value\).*\[2, 5, 3, 3"),
        (_replace(0, lambda v: v.int()), r"value must be floating point"),
        (_replace(0, lambda v: v.float()), r"sampling_locations is .*; float64 cannot be mixed"),
        (_replace(1, lambda s: s[:2]), r"L=2 \(from spatial_shapes\), got \[2, 5, 3, 3, 2, 2\]"),
        (_replace(1, lambda s: [(-5, -7), *s[1:]]), r"spatial_shapes must hold sizes from 0 to 2\^24, got"),
        (_replace(2, lambda x: x[..., 0]), r"sampling_locations must be \(N, Lq, M, L, P, 2\), got \[2, 5, 3, 3, 2\]"),
        (_replace(2, lambda x: x[:1]), r"sampling_locations must be .* N=2.*got \[1, 5, 3, 3, 2, 2\]"),
        (_replace(3, lambda w: w[..., :1]), r"attention_weights must be .* = \[2, 5, 3, 3, 2\].*got \[2, 5, 3, 3, 1\]"),
        (_replace(3, lambda w: w.float()), r"attention_weights is .*; float64 cannot be mixed"),
    ],
)
def test_wrong_argument_is_named_with_rule_and_sizes(attend, make_case, bad_args, message):
    with pytest.raises(RuntimeError, match=message):
        attend(*bad_args(make_case()))


@pytest.mark.cuda
def test_arguments_on_two_devices_are_named(attend, make_case):
    case = make_case()
    other = "cpu" if case.value.is_cuda else "cuda"
    with pytest.raises(RuntimeError, match=r"sampling_locations is on .* but value is on"):
        attend(case.value, case.spatial_shapes, case.sampling_locations.to(other), case.attention_weights)


def test_offsets_beyond_two_to_the_31_elements_are_reached(device):
    """Samples the last row of images of over 2^31 elements each. Only rows that are sampled take memory."""
    N, H, W, M, D = 2, 1024, 1024, 9, 256
    value = torch.empty(N, H * W, M, D, dtype=torch.bfloat16, device=device)
    value[:, -1] = torch.tensor([1.0, 2.0]).view(N, 1, 1)
    locations = torch.tensor([(W - 0.5) / W, (H - 0.5) / H], device=device).expand(N, 1, M, 1, 1, 2)
    output = ms_deform_attn(value, [(H, W)], locations, torch.ones(N, 1, M, 1, 1, device=device))
    assert output.float().view(N, -1).unique(dim=1).flatten().tolist() == [1.0, 2.0]
