"""The CUDA kernels run on the CPU: each thread of a block is a fiber (cuda_emulation.h). Finds wrong indices, missing
barriers, races within a block and wrong sums without a GPU; tells nothing about speed or races between blocks."""

import ctypes
import dataclasses
import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from deformable_detr.layers import ms_deform_attn_pytorch

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
SORTED, OWNED = 0, 1  # in place of the number of threads per row: the backward pass that sorts, that of owners
SHAPES = ((9, 17), (18, 3), (0, 2), (1, 3))


def compile_emulation(source, output, *flags):
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-O1", "-w", *(f"-I{path}" for path in include_paths()), *flags]
    command = [*compiler, *flags, Path(__file__).with_name(source), "-o", output]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def emulate(request, tmp_path_factory):
    """A function that runs a kernel, compiled for the C++ equivalent of an architecture."""
    library = tmp_path_factory.mktemp("emulation") / "kernels.so"
    flags = ["-fPIC", "-shared", *["-DEMULATE_SM_90"] * (request.param == "sm_90")]
    done = compile_emulation("emulated_ms_deform_attn.cpp", library, *flags)
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(library)).emulate
    function.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 11 + [ctypes.c_int, ctypes.c_float, ctypes.c_int64]
    return function


@pytest.fixture
def device():
    return "cpu"


def run(emulate, case, vector, lanes, *, output=None, grads=(None,) * 4, deterministic=False, shared=256 << 10):
    value, _, locations, weights = case.args
    N, S, M, D = value.shape
    _, Lq, _, L, P, _ = locations.shape
    flat_shapes = [size for shape in case.spatial_shapes for size in shape]
    longs = [torch.tensor(numbers) for numbers in ((N, S, M, D, Lq, L, P), flat_shapes, value.stride())]
    bound = 0.0 if grads[0] is None else (grads[0].float().abs().max() * weights.abs().max()).item()
    pointers = [None if x is None else x.data_ptr() for x in (*longs, value, locations, weights, output, *grads)]
    failed = emulate(TYPES.index(value.dtype), vector, lanes, *pointers, deterministic, bound, shared)
    assert not failed


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def forward(emulate, case, vector, lanes, **options):
    N, Lq, M = case.attention_weights.shape[:3]
    output = torch.full((N, Lq, M * case.value.shape[3]), math.nan, dtype=case.value.dtype)
    run(emulate, case, vector, lanes, output=output, **options)
    return output


def backward(emulate, case, vector, lanes, *, grad_output, **options):
    """Gradients of value (before the cast to its dtype, but for owners), locations and weights."""
    accumulate = torch.promote_types(case.value.dtype, torch.float32)
    gradients = [torch.full_like(t, math.nan, dtype=accumulate) for t in case.tensors]
    if lanes == OWNED:
        gradients[0] = torch.full(case.value.shape, math.nan, dtype=case.value.dtype)
    else:
        gradients[0] = torch.zeros(case.value.shape, dtype=accumulate)
    run(emulate, case, vector, lanes, grads=(grad_output, *gradients), **options)
    return gradients


def expected_gradients(case, grad_output):
    case = case.to(torch.float64, torch.float64).with_grad()
    return torch.autograd.grad(ms_deform_attn_pytorch(*case.args), case.tensors, grad_output.double())


# (D, bytes per load, threads per query)
FORWARD = [(32, 16, 0), (32, 1, 32), (30, 1, 32), (5, 1, 8), (300, 1, 32), (64, 16, 0)]


@pytest.mark.parametrize("Lq", [5, sum(h * w for h, w in SHAPES)], ids=["decoder", "encoder"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("D", "load_bytes", "lanes"), FORWARD)
def test_forward_kernel_equals_the_twin(emulate, make_case, dtype, D, load_bytes, lanes, Lq):
    case = make_case(shapes=SHAPES, Lq=Lq, D=D, M=1 + (Lq == 5)).to(dtype, torch.promote_types(dtype, torch.float32))
    vector = max(1, load_bytes // dtype.itemsize)
    expected = ms_deform_attn_pytorch(*case.to(torch.float64, torch.float64).args)
    assert relative_error(forward(emulate, case, vector, lanes or D // vector), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shapes", "M", "P"), [(SHAPES, 4, 2), (((20, 33), (3, 5), (1, 1)), 2, 5)])
def test_forward_kernel_of_two_heads_at_a_time_gives_the_bits_of_one(emulate, make_case, dtype, shapes, M, P):
    """Tiles of 8 lines, whole and not. Heads are worked on one by one where their number is odd."""
    Lq = sum(h * w for h, w in shapes)
    case = make_case(shapes=shapes, Lq=Lq, D=32, M=M + 1, P=P).to(dtype, torch.float32)
    alone = forward(emulate, case, 8, 4).unflatten(2, (M + 1, 32))[:, :, :M].flatten(2)
    value, locations, weights = (tensor[:, :, :M] for tensor in case.tensors)
    locations, weights = locations.contiguous(), weights.contiguous()
    pairs = dataclasses.replace(case, value=value, sampling_locations=locations, attention_weights=weights)
    assert torch.equal(forward(emulate, pairs, 8, 4), alone)


BACKWARD = [
    (torch.float64, 32, 1, 32),
    (torch.float64, 5, 1, 32),
    (torch.float32, 32, 4, 8),
    (torch.float32, 48, 4, 4),
    (torch.float32, 64, 4, 16),
    (torch.float32, 128, 4, 32),
    (torch.float32, 37, 1, 32),
    (torch.bfloat16, 32, 4, 8),
    (torch.bfloat16, 64, 4, 16),
    (torch.float16, 32, 4, 8),
    (torch.float16, 3, 1, 32),
]


@pytest.mark.parametrize("Lq", [5, sum(h * w for h, w in SHAPES)], ids=["decoder", "encoder"])
@pytest.mark.parametrize(("dtype", "D", "vector", "lanes"), BACKWARD)
def test_backward_kernel_equals_the_twin(emulate, make_case, dtype, D, vector, lanes, Lq):
    case = make_case(shapes=SHAPES, Lq=Lq, D=D, M=1 + (Lq == 5)).to(dtype, torch.promote_types(dtype, torch.float32))
    size = (2, Lq, case.value[0, 0].numel())
    grad_output = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    actual = backward(emulate, case, vector, lanes, grad_output=grad_output)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for ours, theirs in zip(actual, expected_gradients(case, grad_output), strict=True):
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shapes", "P"), [(SHAPES, 2), (SHAPES, 4), (((40, 70), (9, 17)), 5)])
def test_sorted_backward_kernel_equals_the_twin(emulate, make_case, dtype, shapes, P):
    """Maps larger and smaller than the window of the sort; points in parts and more than fit at a time."""
    Lq = sum(h * w for h, w in shapes)
    case = make_case(shapes=shapes, Lq=Lq, D=32, M=2, P=P).to(dtype, torch.float32)
    grad_output = torch.randn(2, Lq, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    actual = backward(emulate, case, 4, SORTED, grad_output=grad_output)
    for ours, theirs in zip(actual, expected_gradients(case, grad_output), strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_sorted_backward_kernel_keeps_levels_apart(emulate, make_case):
    """The row of the first pixel of a level follows that of the level before, whose value must not be used again."""
    shapes = [(1, 1), (3, 5), (1, 1), (2, 2)]
    case = make_case(shapes=shapes, Lq=21, D=32, M=1, P=4, margin=0.9).to(torch.float32, torch.float32)
    grad_output = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(0))
    actual = backward(emulate, case, 4, SORTED, grad_output=grad_output)
    for ours, theirs in zip(actual, expected_gradients(case, grad_output), strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_sorted_backward_kernel_keeps_a_bad_gradient_with_its_query(emulate, make_case):
    """Groups of threads without enough points walk through such of no pixel, which name the first query of the tile."""
    shapes = [(4, 5), (1, 2)]
    case = make_case(shapes=shapes, Lq=22, D=32, M=1, P=4).to(torch.float32, torch.float32)
    grad_output = torch.randn(2, 22, 32, generator=torch.Generator().manual_seed(0))
    grad_output[:, 0] = torch.nan
    case.sampling_locations[:, 0] = 0.01  # top left in both levels, where few of the others look
    actual = backward(emulate, case, 4, SORTED, grad_output=grad_output)
    assert actual[0].isnan().any() and not actual[0].isnan().all()
    for ours, theirs in zip(actual, expected_gradients(case, grad_output), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert relative_error(ours.nan_to_num(), theirs.nan_to_num()) < 1e-5


@pytest.mark.parametrize("sigma", [0.0, 0.3, 3.0])
def test_sorted_backward_kernel_adds_up_neighbours(emulate, make_case, sigma):
    """Points about the pixels of their queries, as of a trained encoder: many of a tile fall into the same pixel."""
    shapes = [(20, 36), (10, 18)]
    Lq = sum(h * w for h, w in shapes)
    case = make_case(shapes=shapes, Lq=Lq, D=32, M=1, P=4)
    rows = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1) for h, w in shapes]
    sizes = torch.tensor([(w, h) for h, w in shapes]).view(2, 1, 2)
    noise = torch.randn(case.sampling_locations.shape, generator=torch.Generator().manual_seed(0))
    case.sampling_locations = torch.cat(rows).view(1, Lq, 1, 1, 1, 2) + (sigma * noise + 0.27) / sizes
    case = case.to(torch.float32, torch.float32)
    grad_output = torch.randn(2, Lq, 32, generator=torch.Generator().manual_seed(0))
    actual = backward(emulate, case, 4, SORTED, grad_output=grad_output)
    for ours, theirs in zip(actual, expected_gradients(case, grad_output), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shapes", "Lq", "P"),
    [(SHAPES, 40, 2), (((40, 70), (1, 1), (33, 5)), 300, 4), (SHAPES, 3, 1), (((20, 33),), 700, 4)],
)
def test_owned_backward_kernel_equals_the_twin(emulate, make_case, dtype, shapes, Lq, P):
    """Tiles of every size, whole ones and such that stick out of the map; with few points and with many."""
    case = make_case(shapes=shapes, Lq=Lq, D=32, M=2, P=P, N=2 - (Lq >= 300)).to(dtype, torch.float32)
    grad_output = torch.randn(case.value.shape[0], Lq, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    actual = backward(emulate, case, 4, OWNED, grad_output=grad_output)
    tolerances = TOLERANCE[dtype], 1e-5, 1e-5
    for ours, theirs, tolerance in zip(actual, expected_gradients(case, grad_output), tolerances, strict=True):
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize("spread", [0.0, 2.0, 8.0])
def test_owned_backward_kernel_adds_up_what_all_queries_look_at(emulate, make_case, spread):
    """600 points around a pixel, or around some: cells for a block, for a warp and for a group of threads."""
    case = make_case(shapes=[(20, 33)], N=1, M=1, Lq=150, D=32, P=4).to(torch.float32, torch.float32)
    noise = torch.rand(case.sampling_locations.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    case.sampling_locations = (torch.tensor([15.9, 8.7]) + spread * noise) / torch.tensor([33, 20])
    grad_output = torch.randn(1, 150, 32, generator=torch.Generator().manual_seed(0))
    actual, expected = backward(emulate, case, 4, OWNED, grad_output=grad_output), expected_gradients(case, grad_output)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert torch.equal(actual[0] == 0, expected[0] == 0)


@pytest.mark.parametrize("P", [1, 7, 40])
def test_any_number_of_points_fits_into_shared_memory(emulate, make_case, P):
    """40 points on 4 levels need fewer queries per pass than the block has places for."""
    case = make_case(shapes=SHAPES, P=P, D=32, Lq=40, M=1).to(torch.float32, torch.float32)
    expected = ms_deform_attn_pytorch(*case.to(torch.float64, torch.float64).args)
    assert relative_error(forward(emulate, case, 4, 8), expected) < 1e-5
    grad_output = torch.randn(2, 40, 32)
    actual = backward(emulate, case, 4, 8, grad_output=grad_output)
    for ours, theirs in zip(actual, expected_gradients(case, grad_output), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blocks_of_fewer_warps_give_the_same_where_shared_memory_is_small(emulate, make_case, dtype):
    """20 KB in place of 92 and 55: 2 and 4 warps of 16. Each query is still summed by one warp in one order."""
    Lq = sum(h * w for h, w in SHAPES)
    case = make_case(shapes=SHAPES, Lq=Lq, D=32, M=1).to(dtype, dtype)
    vector, lanes = (1, 32) if dtype == torch.float64 else (4, 8)
    small, large = ({"shared": size << 10} for size in (20, 256))
    assert torch.equal(forward(emulate, case, 1, 32, **small), forward(emulate, case, 1, 32, **large))
    grad_output = torch.randn(2, Lq, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = (backward(emulate, case, vector, lanes, grad_output=grad_output, **size) for size in (small, large))
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
    assert relative_error(ours[0], theirs[0].double()) < TOLERANCE[dtype]


def test_value_may_have_any_strides_with_contiguous_channels(emulate, make_case):
    case = make_case(D=32).to(torch.float32, torch.float32)
    expected = forward(emulate, case, 4, 8)
    case.value = case.value.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(forward(emulate, case, 4, 8), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, 3e38])
def test_location_that_is_no_place_contributes_nothing(emulate, make_case, bad):
    case = make_case(D=32).to(torch.float32, torch.float32)
    case.sampling_locations[0, 2, 1, 0, 1, 0] = bad
    grad_output = torch.ones(2, 5, 96)
    result = forward(emulate, case, 4, 8), *backward(emulate, case, 4, 8, grad_output=grad_output)
    owned = backward(emulate, case, 4, OWNED, grad_output=grad_output)
    case.sampling_locations[0, 2, 1, 0, 1] = 5.0
    expected = forward(emulate, case, 4, 8), *backward(emulate, case, 4, 8, grad_output=grad_output)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(tuple(owned), expected[1:])
    assert not result[2][0, 2, 1, 0, 1].any() and not result[3][0, 2, 1, 0, 1].any()


def test_pixels_that_are_not_sampled_do_not_leak(emulate, make_case):
    case = make_case(shapes=[(4, 4)], N=1, M=1, Lq=1, P=1, D=32).to(torch.float32, torch.float32)
    case.value[:] = math.nan
    case.value[0, [3, 7]] = 1.0
    case.sampling_locations[:] = torch.tensor([3.75, 1.0]) / 4
    torch.testing.assert_close(
        forward(emulate, case, 4, 8), torch.full((1, 1, 32), 0.75) * case.attention_weights.item()
    )
    gradients = backward(emulate, case, 4, 8, grad_output=torch.ones(1, 1, 32))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_deterministic_sums_are_as_exact_as_float32_at_every_scale(emulate, make_case, scale):
    case = make_case(D=32).to(torch.float32, torch.float32)
    grad_output = torch.randn(2, 5, 96) * scale
    gradient, *_ = backward(emulate, case, 1, 32, grad_output=grad_output, deterministic=True)
    assert relative_error(gradient, expected_gradients(case, grad_output)[0]) < 1e-6


def test_deterministic_sums_say_when_a_gradient_is_not_finite(emulate, make_case):
    case = make_case(D=32).to(torch.float32, torch.float32)
    grad_output = torch.ones(2, 5, 96)
    grad_output[0, 0, 0] = math.inf
    gradient, *_ = backward(emulate, case, 1, 32, grad_output=grad_output, deterministic=True)
    assert gradient.isnan().all()


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    """A function that runs a kernel under ThreadSanitizer and returns what it reports."""
    program = tmp_path_factory.mktemp("race") / "race"
    done = compile_emulation("race_ms_deform_attn.cpp", program, "-g", "-fsanitize=thread", "-DEMULATE_SM_90")
    # The linker's words for its library. Other errors, of what it has to offer too, are ours.
    if re.search(r"cannot find -ltsan|tsan\S*: No such file", done.stderr):
        pytest.skip("the compiler comes without ThreadSanitizer")
    assert done.returncode == 0, done.stderr
    # It knows a few places where a program may lie, fewer than the system chooses among.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []

    def run_race(arguments, *, is_ordered=True):
        command = [*fixed, program, str(int(is_ordered)), *arguments.split()]
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if "unexpected memory mapping" in done.stderr or "setarch: failed" in done.stderr:
            pytest.skip("ThreadSanitizer does not run here")
        assert done.returncode == (66 if "WARNING: ThreadSanitizer: data race" in done.stderr else 0), done.stderr
        return done.stderr

    return run_race


# Pass, type, vector, lanes (SORTED, OWNED), N, M, Lq, P, how far locations lie apart, levels.
RACES = {
    "forward": "forward 1 4 8 1 1 0 4 1.2 9 17 3 3",
    "forward of few queries": "forward 2 8 4 1 1 7 3 1.2 9 17",
    "forward of two heads": "forward 2 8 4 1 2 0 9 1.2 9 17 20 4",
    "backward": "backward 1 4 8 1 1 0 4 1.2 9 17",
    "backward of few queries": "backward 1 4 8 1 1 5 2 1.2 5 7 3 4",
    "sorted": "backward 1 4 0 1 1 0 6 1.3 17 20 4 5 0 3 1 1",
    "sorted, in 16 bits": "backward 2 4 0 1 2 0 4 0.2 16 16 3 3",
    "owned": "backward 1 4 1 1 2 150 4 1.2 20 33 5 4",
    "owned, cells for a block": "backward 1 4 1 1 1 150 4 0.02 20 33",
    "owned, cells for a warp": "backward 1 4 1 1 1 200 4 0.15 20 33",
    "owned, in 16 bits": "backward 2 4 1 1 1 600 4 0.3 9 40",
}


@pytest.mark.parametrize("arguments", RACES.values(), ids=RACES.keys())
def test_threads_of_a_block_meet_at_a_barrier_before_one_reads_what_another_wrote(race, arguments):
    assert race(arguments) == ""
    assert "data race" in race(arguments, is_ordered=False)
