"""Exports a model as a program for ONNX, torch.export or TorchScript: ``python -m deformable_detr.export --help``.

To write its *weights* for other projects see :mod:`deformable_detr.checkpoint`.
"""

from .agreement import DisagreementError
from .exporter import FORMATS, export_model
from .program import DetectionProgram, InputShape

__all__ = ["FORMATS", "DetectionProgram", "DisagreementError", "InputShape", "export_model"]
