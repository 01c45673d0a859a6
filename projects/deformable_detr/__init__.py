"""Deformable DETR for Detectron2. Importing this package registers its models and does nothing else."""

from . import modeling  # registers DeformableDETR and build_multi_scale_backbone
from .config import add_deformable_detr_config, load_config

__version__ = "0.1.0"
__all__ = ["add_deformable_detr_config", "load_config", "modeling"]
