"""Detect objects in images and videos: ``Predictor`` in Python, ``python -m deformable_detr.detect`` in a shell."""

from .images import ImageError, prepare_image, read_image
from .predictor import Predictor

__all__ = ["ImageError", "Predictor", "prepare_image", "read_image"]
