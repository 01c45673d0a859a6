"""Weights of other projects: ``read_checkpoint`` for files, ``convert`` to our names and classes, ``export`` back.

Detectron2 is needed by the command line alone; the checkpointer that training uses is ``training.checkpointer``.
"""

from .convert import convert
from .coverage import CheckpointError, ConversionReport
from .foreign import export
from .reading import read_checkpoint

__all__ = ["CheckpointError", "ConversionReport", "convert", "export", "read_checkpoint"]
