"""The CUDA sources compile, and the compiler's report on their kernels: all numbers stay in registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import CUDA_HOME, include_paths

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
# What D = 32 runs: 16-byte loads or reductions, by as many threads as a row of 32 channels needs.
USUAL_KERNELS = f"""
#include <c10/util/BFloat16.h>
#include "{CUDA / "ms_deform_attn_forward.cuh"}"
#include "{CUDA / "ms_deform_attn_owned_backward.cuh"}"
#include "{CUDA / "ms_deform_attn_sorted_backward.cuh"}"
namespace deformable_detr {{
#define FORWARD(T, VEC, HEADS) template __global__ void forward_kernel<T, float, VEC, HEADS>( \\
    const Geometry, const T*, const float*, const float*, T*);
#define BACKWARD(T) template __global__ void backward_kernel<T, float, 4, 8, AtomicSum<float>>( \\
    const Geometry, const T*, const T*, const float*, const float*, const AtomicSum<float>, float*, float*);
#define SORTED(T) template __global__ void sorted_backward_kernel<T, kSortedLanes>( \\
    const Geometry, const T*, const T*, const float*, const float*, float*, float*, float*);
#define OWNED(T) template __global__ void owned_backward_kernel<T>( \\
    const Geometry, const OwnedTiles, const T*, const T*, const float*, const float*, T*, float*, float*);
FORWARD(float, 4, 1) FORWARD(c10::BFloat16, 8, 1) FORWARD(c10::BFloat16, 8, 2)
BACKWARD(float) BACKWARD(c10::BFloat16) SORTED(float) SORTED(c10::BFloat16)
OWNED(float) OWNED(c10::BFloat16)
}}
"""
REPORT = re.compile(
    r"entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_kernels(source: Path, architecture: str, folder: Path) -> list[dict[str, str]]:
    """Compile with nvcc and return its report on each kernel: name, stack, stores, loads, registers."""
    nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
    if not nvcc:
        pytest.skip("no nvcc")
    if f"sm_{architecture}" not in subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout:
        pytest.skip(f"{nvcc} is too old for sm_{architecture}")
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    # For the device only: the C++ compiler's pass over the host code takes longer than all the rest, and nvcc checks
    # that code either way.
    flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", code, "-Xptxas=-v"]
    output = ["-cubin", "-o", folder / "kernels.cubin"]
    includes = [f"-I{path}" for path in include_paths()]
    done = subprocess.run([nvcc, *flags, *output, *includes, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [match.groupdict() for match in REPORT.finditer(done.stderr)]


def assert_kernels_stay_in_registers(kernels: list[dict[str, str]]) -> None:
    for kernel in kernels:
        assert kernel["stack"] == kernel["stores"] == kernel["loads"] == "0", kernel
        # 65536 registers per multiprocessor for up to 2048 threads: at 64 registers half of them are resident.
        assert int(kernel["registers"]) <= 64, kernel


@pytest.mark.slow
def test_every_kernel_compiles_for_sm_90_without_local_memory(tmp_path):
    kernels = compile_kernels(CUDA / "ms_deform_attn_kernel.cu", "90", tmp_path)
    assert len(kernels) >= 20
    assert_kernels_stay_in_registers(kernels)


@pytest.mark.parametrize("architecture", ["80", "100", "120"])
def test_usual_kernels_compile_without_local_memory(tmp_path, architecture):
    source = tmp_path / "kernels.cu"
    source.write_text(USUAL_KERNELS)
    kernels = compile_kernels(source, architecture, tmp_path)
    assert len(kernels) == 9
    assert_kernels_stay_in_registers(kernels)
