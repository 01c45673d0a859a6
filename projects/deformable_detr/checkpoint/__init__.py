"""Weights of other projects: ``read_checkpoint`` for files, ``convert`` to our names and classes, ``export`` back.

The checkpointer that training uses is in ``deformable_detr.checkpoint.checkpointer``; it alone needs Detectron2.
"""

from .convert import convert
from .coverage import CheckpointError, ConversionReport
from .foreign import export
from .reading import read_checkpoint

__all__ = ["CheckpointError", "ConversionReport", "convert", "export", "read_checkpoint"]
