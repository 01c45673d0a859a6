"""Gradients of ms_deform_attn: against finite differences and the twin, at the edges, and their reproducibility."""

import math

import pytest
import torch

from deformable_detr.layers import _pytorch, ms_deform_attn, ms_deform_attn_pytorch

# Relative L2 error allowed against the twin in float64 on the same, already rounded, inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def gradients(attend, case, grad_output=None):
    """Gradients of value, locations and weights for a fixed random grad_output."""
    case = case.with_grad()
    output = attend(*case.args)
    if grad_output is None:
        generator = torch.Generator().manual_seed(1)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return torch.autograd.grad(output, case.tensors, grad_output)


def assert_gradients_equal_the_twin(case):
    tolerance = TOLERANCE[case.value.dtype]
    generator = torch.Generator().manual_seed(1)
    N, Lq = case.sampling_locations.shape[:2]
    grad = torch.randn(N, Lq, case.value[0, 0].numel(), generator=generator).to(case.value)
    expected = gradients(ms_deform_attn_pytorch, case.to(torch.float64, torch.float64), grad.double())
    for name, actual, tensor, reference in zip(
        ("value", "locations", "weights"), gradients(ms_deform_attn, case, grad), case.tensors, expected, strict=True
    ):
        assert actual.dtype == tensor.dtype and actual.shape == tensor.shape, name
        error = (actual.double() - reference).norm() / reference.norm().clamp(min=1e-300)
        assert error < tolerance, f"{name}: {error:.2e}"


def test_gradients_equal_finite_differences(attend, make_case):
    case = make_case().with_grad()
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: attend(value, case.spatial_shapes, locations, weights),
        case.tensors,
        nondet_tol=1e-12,  # on CUDA sums have no fixed order
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("D", [1, 3, 8, 16, 30, 32, 48, 64, 71, 256, 1025])
def test_gradients_equal_the_twin_for_every_head_dimension(make_case, D, dtype):
    assert_gradients_equal_the_twin(make_case(D=D).to(dtype, torch.promote_types(dtype, torch.float32)))


@pytest.mark.parametrize("L", [1, 5, 8])
@pytest.mark.parametrize("P", [1, 3, 16])
def test_gradients_equal_the_twin_for_every_number_of_levels_and_points(make_case, L, P):
    shapes = [(3 + level, 7 - level % 3) for level in range(L)]
    assert_gradients_equal_the_twin(make_case(shapes=shapes, P=P, D=32))


@pytest.mark.parametrize("N", [1, 3, 65])
def test_gradients_equal_the_twin_for_one_query_per_pixel(make_case, N):
    shapes = [(9, 17), (16, 3), (0, 2), (1, 3)]
    case = make_case(shapes=shapes, N=N, Lq=sum(h * w for h, w in shapes), D=32)
    assert_gradients_equal_the_twin(case.to(torch.float32, torch.float32))


@pytest.mark.parametrize("bad", [0.4, 7.0, math.nan, math.inf])
@pytest.mark.parametrize("sizes", [{}, {"N": 0}, {"Lq": 0}, {"shapes": ((2, 3), (0, 3))}, {"shapes": ()}], ids=str)
def test_gradients_without_a_kernel_equal_autograd_of_the_twin(make_case, sizes, bad):
    """Where no kernel is compiled the op runs backward formulas written in PyTorch, checked here against autograd."""
    case = make_case(**sizes)
    case.sampling_locations.flatten()[:9] = bad
    flat = [size for shape in case.spatial_shapes for size in shape]
    grad = torch.randn(case.sampling_locations.shape[:2] + (12,), dtype=torch.float64, device=case.value.device)
    with_grad = case.with_grad()
    output = ms_deform_attn_pytorch(*with_grad.args)
    # Without a level to sample from the twin's output depends on nothing.
    output = output + sum(tensor.nan_to_num().sum() * 0 for tensor in with_grad.tensors)
    expected = torch.autograd.grad(output, with_grad.tensors, grad)
    actual = _pytorch.backward(grad, case.value, flat, *case.tensors[1:])
    torch.testing.assert_close(actual, expected)


def test_gradients_of_half_locations_are_half(make_case):
    case = make_case().to(torch.bfloat16, torch.bfloat16)
    assert [gradient.dtype for gradient in gradients(ms_deform_attn, case)] == [torch.bfloat16] * 3


def test_gradients_outside_the_maps_are_zero(attend, make_case):
    case = make_case()
    case.sampling_locations += 3
    for gradient in gradients(attend, case):
        assert not gradient.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, 3e38])
def test_location_that_is_no_place_gets_and_gives_zero_gradient(attend, make_case, bad):
    case = make_case(D=32).to(torch.float32, torch.float32)
    point = (0, 2, 1, 0, 1)
    case.sampling_locations[point][0] = bad
    bad_value, bad_locations, bad_weights = gradients(attend, case)
    case.sampling_locations[point] = 5.0
    value, locations, weights = gradients(attend, case)
    assert not bad_locations[point].any() and not bad_weights[point].any()
    torch.testing.assert_close((bad_value, bad_locations, bad_weights), (value, locations, weights))


def test_pixels_that_are_not_sampled_do_not_leak_into_gradients(attend, make_case):
    """A NaN beside the border column of a map, next in memory, does not reach samples that fade over that border."""
    case = make_case(shapes=[(4, 4)], N=1, M=1, Lq=1, P=1, D=32)
    case.value[:, :] = math.nan
    case.value[0, [3, 7]] = 1.0
    case.sampling_locations[:] = torch.tensor([3.75, 1.0]) / 4
    _, locations, weights = gradients(attend, case, torch.ones(1, 1, 32, dtype=torch.float64, device=case.value.device))
    assert weights.item() == pytest.approx(32 * 0.75)
    slope = locations.new_tensor([-32.0 * 4, 0.0])  # the sum of 32 channels falls by 1 per pixel, of 4 pixels
    torch.testing.assert_close(locations.flatten(), case.attention_weights.flatten() * slope)


@pytest.mark.parametrize(
    "sizes", [{"N": 0}, {"Lq": 0}, {"M": 0}, {"D": 0}, {"P": 0}, {"shapes": ()}, {"shapes": ((0, 3),)}], ids=str
)
def test_gradients_of_empty_input_are_zeros_of_its_shape(make_case, sizes):
    case = make_case(**sizes)
    for gradient, tensor in zip(gradients(ms_deform_attn, case), case.tensors, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_layout_of_tensors_does_not_matter(make_case, dtype):
    case = make_case(D=32).to(dtype, torch.float32)
    grad = torch.ones(2, 5, 96, dtype=dtype, device=case.value.device)
    expected = gradients(ms_deform_attn, case, grad)
    case.value = case.value.transpose(1, 3).contiguous().transpose(1, 3)
    case.sampling_locations = case.sampling_locations.transpose(1, 3).contiguous().transpose(1, 3)
    actual = gradients(ms_deform_attn, case, torch.ones(1, 1, 1, dtype=dtype, device=grad.device).expand_as(grad))
    torch.testing.assert_close(actual, expected)


def test_only_the_asked_for_gradients_are_returned(make_case):
    case = make_case()
    case.sampling_locations.requires_grad_()
    ms_deform_attn(*case.args).sum().backward()
    assert case.sampling_locations.grad is not None and case.value.grad is None


def test_second_derivative_is_refused(make_case):
    case = make_case().with_grad()
    (gradient,) = torch.autograd.grad(ms_deform_attn(*case.args).sum(), case.attention_weights, create_graph=True)
    with pytest.raises(RuntimeError, match="ms_deform_attn is once differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_and_gradients_do_not_depend_on_the_number_of_threads(make_case, device, dtype):
    if device != "cpu":
        pytest.skip("threads are the CPU's")
    shapes = [(17, 23), (9, 12), (5, 6)]
    case = make_case(shapes=shapes, Lq=sum(h * w for h, w in shapes), D=32).to(dtype, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append((ms_deform_attn(*case.args), *gradients(ms_deform_attn, case)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_deterministic_mode_repeats_to_the_bit(make_case, dtype):
    case = make_case(Lq=400, D=32).to(dtype, torch.float32)
    # A warning is enough of the twin, which has no deterministic gradient on CUDA.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert_gradients_equal_the_twin(case)
        first, second = gradients(ms_deform_attn, case), gradients(ms_deform_attn, case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
