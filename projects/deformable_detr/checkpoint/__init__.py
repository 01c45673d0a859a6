"""Weights of other projects in our names: ``convert`` for state dicts, ``read_checkpoint`` for files.

The checkpointer that training uses is in ``deformable_detr.checkpoint.checkpointer``; it alone needs Detectron2.
"""

from .convert import convert
from .files import read_checkpoint
from .report import CheckpointError, ConversionReport

__all__ = ["CheckpointError", "ConversionReport", "convert", "read_checkpoint"]
