"""What only a CUDA device can show: streams, graphs, a second device, no waiting for the device."""

import pytest
import torch

from deformable_detr.layers import MSDeformAttn, _ops, ms_deform_attn, ms_deform_attn_pytorch

from .large_ms_deform_attn import LARGE, check_gradients_at_the_end

pytestmark = pytest.mark.cuda


@pytest.fixture
def device():
    if not _ops.has_kernel("cuda"):
        pytest.skip("the library was built without CUDA")
    return "cuda"


def train_step(case):
    return torch.autograd.grad(ms_deform_attn(*case.args).sum(), case.tensors)


def test_work_runs_on_the_current_stream(make_case):
    case = make_case(D=32, Lq=300).to(torch.float32, torch.float32)
    expected = ms_deform_attn_pytorch(*case.args)
    locations = case.sampling_locations.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Late data: on another stream the kernel would read the locations before they are there.
        case.sampling_locations.fill_(5.0)
        torch.cuda._sleep(10**8)
        case.sampling_locations.copy_(locations)
        output = ms_deform_attn(*case.args)
    stream.synchronize()
    torch.testing.assert_close(output, expected)


def test_graph_replays_with_new_data(make_case):
    case = make_case(D=32).to(torch.float32, torch.float32).with_grad()
    train_step(case)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        gradients = train_step(case)
    with torch.no_grad():
        case.value.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(gradients, train_step(case))


def test_tensors_on_another_than_the_current_device_work(make_case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    case = make_case(D=32).to(torch.float32, torch.float32)
    expected = train_step(case.with_grad())
    case.value, case.sampling_locations, case.attention_weights = (tensor.to("cuda:1") for tensor in case.tensors)
    for actual, reference in zip(train_step(case.with_grad()), expected, strict=True):
        torch.testing.assert_close(actual.to("cuda:0"), reference)


def assert_output_and_gradients_equal_the_twin(case):
    ours, reference = case.with_grad(), case.to(torch.float64, torch.float64).with_grad()
    output, exact_output = ms_deform_attn(*ours.args), ms_deform_attn_pytorch(*reference.args)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(case.value)
    actual = output, *torch.autograd.grad(output, ours.tensors, grad_output)
    expected = exact_output, *torch.autograd.grad(exact_output, reference.tensors, grad_output.double())
    for tensor, exact in zip(actual, expected, strict=True):
        tolerance = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}[tensor.dtype]
        assert (tensor.double() - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("P", [3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_encoder_of_many_tiles_equals_the_twin(device, make_case, dtype, P):
    """One query per pixel and 32 channels: blocks take two heads at a time in 16 bits, and add up gradients where the
    device can."""
    shapes = [(50, 71), (25, 36), (13, 18), (1, 1), (3, 5)]
    Lq = sum(h * w for h, w in shapes)
    case = make_case(shapes=shapes, N=2, M=2, D=32, Lq=Lq, P=P).to(dtype, torch.float32)
    assert_output_and_gradients_equal_the_twin(case)


@pytest.mark.parametrize(("Lq", "margin"), [(1, 0.2), (300, 0.2), (300, -0.499), (1100, -0.35), (1300, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_decoder_equals_the_twin(device, make_case, dtype, Lq, margin):
    """Few queries and 32 channels: blocks own cells of grad_value. 1300 queries are too many for them."""
    shapes = [(100, 167), (50, 84), (25, 42), (13, 21)]
    case = make_case(shapes=shapes, N=2, M=2, D=32, Lq=Lq, P=4, margin=margin)  # negative: all look at the middle
    assert_output_and_gradients_equal_the_twin(case.to(dtype, torch.float32))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_gradients_reach_offsets_beyond_two_to_the_31_elements(device, case, dtype, deterministic):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        check_gradients_at_the_end(LARGE[case], dtype, device)
    finally:
        torch.use_deterministic_algorithms(False)


def test_second_step_of_the_module_does_not_wait_for_the_device():
    attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=2).cuda()
    inputs = [torch.rand(2, 5, 32), torch.rand(2, 5, 2, 2), torch.rand(2, 30, 32)]
    query, reference_points, value = (tensor.cuda() for tensor in inputs)
    shapes = [(4, 6), (2, 3)]
    attention(query, reference_points, value, shapes).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(query, reference_points, value, shapes).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
