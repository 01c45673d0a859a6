"""Builds deformable_detr with its compiled operator. Environment variables:

DEFORMABLE_DETR_BUILD_OPS=0   build no operator; what a checkout has built before stays in use until it is deleted.
FORCE_CUDA=1                  build the CUDA kernels on a machine without a GPU; without a toolkit this fails.
TORCH_CUDA_ARCH_LIST          CUDA architectures, as for every PyTorch extension.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.errors import CompileError, LinkError

CSRC = Path("csrc")
CXX_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# at::parallel_for is a header: without this it compiles to a plain loop. Apple's compiler does not have it.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]
# For a build without a GPU to ask; PTX for what is newer.
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"
ORDER = "Install in this order: torch and torchvision; Detectron2 (python tools/install_detectron2.py); this package"


def say(message: str) -> None:
    print(f"deformable_detr: {message}", file=sys.stderr)


def compiles(flags: list[str]) -> bool:
    """Whether PyTorch's build, with the C++ standard that it chooses, makes a library of what the operator includes."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <ATen/Parallel.h>\n#include <ATen/core/TensorBase.h>\n")
        probe = CppExtension("probe", [str(source)], extra_compile_args=CXX_FLAGS + flags, extra_link_args=flags)
        build = BuildExtension(Distribution({"ext_modules": [probe]}))
        build.build_lib = build.build_temp = folder
        try:
            build.ensure_finalized()
            build.run()
        # With ninja and without it; asking a compiler that is not one for its version.
        except (RuntimeError, CompileError, LinkError, OSError, subprocess.SubprocessError):
            return False
    return True


def find_openmp_flags() -> list[str] | None:
    """Flags for OpenMP, as far as the C++ compiler takes them; None where it cannot compile the operator at all."""
    if sys.platform == "win32":
        say("the operator is not built on Windows: its slower PyTorch twin is used")
        return None
    if compiles(OPENMP_FLAGS):
        return OPENMP_FLAGS
    if OPENMP_FLAGS and compiles([]):
        say("the C++ compiler takes no -fopenmp: on the CPU the operator will run in one thread (at::parallel_for)")
        return []
    say(
        "no C++ compiler (c++ or CXX; g++ 10 or newer) works here for the installed PyTorch: installing without the "
        "operator, its slower PyTorch twin is used"
    )
    return None


def locate_toolkit() -> None:
    """Set CUDA_HOME to the toolkit of the nvcc on the PATH, which may be a wrapper script outside of it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    steps = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", steps)
    if top is not None:
        os.environ["CUDA_HOME"] = os.path.realpath(top[1])


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here; None where they can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None:
        return "no CUDA toolkit was found (CUDA_HOME)"
    try:
        report = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return f"{CUDA_HOME} has no nvcc"
    toolkit = re.search(r"release (\d+)\.(\d+)", report)
    if toolkit is None or toolkit[1] != torch.version.cuda.split(".")[0]:
        found = f"{toolkit[1]}.{toolkit[2]}" if toolkit else "of unknown version"
        return f"torch needs CUDA {torch.version.cuda} but the toolkit in {CUDA_HOME} is {found}"
    return None


def with_cuda() -> bool:
    import torch

    forced = os.environ.get("FORCE_CUDA", "0") == "1"
    if not forced and not torch.cuda.is_available():
        return False
    obstacle = cuda_obstacle()
    if obstacle is None:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
        return True
    if forced:
        raise SystemExit(f"deformable_detr: FORCE_CUDA=1, but {obstacle}")
    say(f"building the operator for the CPU only, because {obstacle}")
    return False


def show_installed_packages() -> bool:
    """Make the packages of the environment importable where pip isolates the build from them.

    The operator has to be compiled against the very PyTorch that will load it. A copy that pip would fetch for the
    build alone may be of another version.

    Returns:
        Whether the build is isolated, as in a plain ``pip install``.
    """
    if find_spec("torch") is not None:
        return False
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-c", "import sys; print(*sys.path, sep='\\n')"]
    paths = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    # Behind the build's own packages, so that its setuptools stays the one in use.
    sys.path.extend(path for path in paths if path not in sys.path)
    return True


def get_extensions() -> list:
    if os.environ.get("DEFORMABLE_DETR_BUILD_OPS", "1") == "0":
        return []
    isolated = show_installed_packages()
    locate_toolkit()  # before PyTorch looks for it
    try:
        from torch.utils.cpp_extension import CppExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            f"deformable_detr: building the operator needs PyTorch ({error}). {ORDER}. If it is installed, add "
            "--no-build-isolation to the pip command (or set DEFORMABLE_DETR_BUILD_OPS=0)"
        ) from error
    if isolated and find_spec("detectron2") is None:
        # pip itself would only say that it finds no distribution of that name.
        raise SystemExit(
            f"deformable_detr: there is no Detectron2. {ORDER}. For deformable_detr.layers alone, which needs PyTorch "
            "only: pip install --no-deps --no-build-isolation -e ."
        )
    openmp = find_openmp_flags()
    if openmp is None:
        return []
    cuda = with_cuda()
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp"), *(CSRC.glob("cuda/*.cu") if cuda else ())]
    extension = CUDAExtension if cuda else CppExtension
    return [
        extension(
            "deformable_detr._C",
            sorted(map(str, sources)),
            depends=sorted(str(path) for path in CSRC.rglob("*.h")) + sorted(str(path) for path in CSRC.rglob("*.cuh")),
            extra_compile_args={"cxx": CXX_FLAGS + openmp, "nvcc": NVCC_FLAGS},
            extra_link_args=openmp,
            # The library registers operators and has no Python symbol: one file serves every Python version.
            py_limited_api=True,
        )
    ]


def get_commands(extensions: list) -> dict:
    if not extensions:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


extensions = get_extensions()
setup(
    name="deformable_detr",
    version="0.1.0",
    description="Deformable DETR for Detectron2",
    license="Apache-2.0",
    python_requires=">=3.10",
    # A wheel carries the configurations along, for model_zoo to find; in a checkout they are at the top.
    packages=[*find_packages("projects"), "deformable_detr.model_zoo.configs"],
    package_dir={"": "projects", "deformable_detr.model_zoo.configs": "configs"},
    package_data={
        "deformable_detr.model_zoo.configs": ["*/*.yaml", "*/*.py"],
        "deformable_detr.explain": ["page.html"],
        "deformable_detr.report": ["page.html"],
        "deformable_detr.study": ["study.yaml"],
    },
    install_requires=[
        "detectron2",
        "torch>=2.4",
        "torchvision",
        "fvcore",
        "hydra-core",
        "iopath",
        "jinja2",
        "omegaconf",
        "pycocotools",
        "scipy",
        "opencv-python",
        "numpy",
        "matplotlib",
        "pillow",
        "safetensors",
        "tabulate",
        "tqdm",
    ],
    extras_require={
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "timm": ["timm"],
        # YOLO's and Pascal VOC's folders; 110 MB with its video library.
        "yolo": ["supervision"],
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "transformers>=4.57,<4.58",
            "timm",
            "ruff",
            "clang-format",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "supervision",
            "tensorboard",
        ],
    },
    entry_points={"console_scripts": ["deformable-detr = deformable_detr.__main__:main"]},
    ext_modules=extensions,
    cmdclass=get_commands(extensions),
    zip_safe=False,
)
