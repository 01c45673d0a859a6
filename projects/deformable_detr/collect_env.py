"""What is installed and what was built: `python -m deformable_detr.collect_env`. For bug reports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch.utils.collect_env import get_pretty_env_info

from .cli import make_parser, run
from .layers import _ops
from .wording import explain_missing_c, ignoring_records


def collect_env_info() -> str:
    """Detectron2's report, followed by that of ms_deform_attn: built for what, what is missing, how to get it.

    Without Detectron2, where there is the operator alone, PyTorch's report takes the place of its.
    """
    rows = "\n".join(f"{name:20}{value}" for name, value in operator_rows())
    return f"{_packages()}\n\nms_deform_attn\n{rows}"


def _packages() -> str:
    if find_spec("detectron2") is None:
        return get_pretty_env_info() + "\nDetectron2 is not installed: python tools/install_detectron2.py"
    from detectron2.utils.collect_env import collect_env_info as detectron2_env_info

    # The report says whether there is a GPU.
    with ignoring_records("torch.utils.cpp_extension", "No CUDA runtime is found"):
        return explain_missing_c(detectron2_env_info())


def operator_rows() -> list[tuple[str, str]]:
    """(property, value) pairs about the compiled operator."""
    library = _ops.find_library()
    rows = [
        ("library", str(library) if library else "not built"),
        ("CPU kernel", _describe("cpu")),
        ("CUDA kernel", _describe("cuda")),
    ]
    if library and _ops.has_kernel("cuda"):
        rows.append(("CUDA architectures", cuda_architectures(str(library))))
    return rows


def _describe(device_type: str) -> str:
    if _ops.has_kernel(device_type):
        return "yes"
    if _ops.unavailable_reason is not None:
        missing = f"no: {_ops.unavailable_reason}; to build it for torch {torch.__version__}: {_ops.BUILD}"
    elif torch.version.cuda is None:
        missing = f"no: torch {torch.__version__} is built without CUDA"
    else:
        missing = (
            f"no: the library was built without it; with a CUDA {torch.version.cuda.split('.')[0]} toolkit: "
            f"FORCE_CUDA=1 {_ops.BUILD}"
        )
    return f"{missing}; the PyTorch implementation is used"


def cuda_architectures(library: str) -> str:
    """Architectures a library holds code for, by cuobjdump where the CUDA toolkit is installed."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        return "unknown (cuobjdump of the CUDA toolkit tells)"
    listing = [
        subprocess.run([tool, option, library], capture_output=True, text=True).stdout
        for option in ("--list-elf", "--list-ptx")
    ]
    binaries, ptx = (sorted(set(re.findall(r"sm_\w+", text))) for text in listing)
    return ", ".join([*binaries, *(f"{name.replace('sm', 'compute')} (PTX)" for name in ptx)])


def main(argv: Sequence[str] | None = None) -> None:
    make_parser("collect_env", description="Says what is installed and what was built, for bug reports.").parse_args(
        argv
    )
    print(collect_env_info())


if __name__ == "__main__":
    sys.exit(run(main))
