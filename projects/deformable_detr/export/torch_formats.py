"""Writes and runs the two formats that PyTorch itself loads."""

import inspect
import warnings
from pathlib import Path

import torch
from torch.export import ExportedProgram

from .agreement import Runner


def write_torch_export(program: ExportedProgram, path: Path, *, metadata: dict[str, str]) -> None:
    """Save for ``torch.export.load``.

    Args:
        metadata: stored as extra files by these names.
    """
    torch.export.save(program, path, extra_files=metadata)


def load_torch_export(path: Path) -> Runner:
    return torch.export.load(path).module()


def write_torchscript(program: ExportedProgram, path: Path, *, metadata: dict[str, str]) -> None:
    """Save for ``torch.jit.load``, in Python or C++.

    Traced from the captured program, whose sizes are constants: from the model itself a trace would record some of
    its sizes as constants and others not.
    """
    # Newer PyTorch puts checks of the inputs into the module, which TorchScript cannot take; an older one has none.
    options = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    with warnings.catch_warnings():
        # TorchScript is deprecated, which the documentation of the command line says.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(program.module(**options), program.example_inputs[0], check_trace=False)
        torch.jit.save(traced, path, _extra_files=metadata)


def load_torchscript(path: Path) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path)
