"""Deformable DETR for Detectron2. Importing this package registers its models and ``deformable-detr://``, no more."""

from . import model_zoo, modeling  # modeling registers DeformableDETR and build_multi_scale_backbone
from .config import add_deformable_detr_config, load_config

model_zoo.register_handler()

__version__ = "0.1.0"
__all__ = ["add_deformable_detr_config", "load_config", "model_zoo", "modeling"]
