"""Configurations of both of Detectron2's systems: the keys, reading and overriding them."""

from .keys import add_deformable_detr_config
from .load import find_config_file, load_config
from .view import KEYS, RunConfig

__all__ = [
    "KEYS",
    "RunConfig",
    "add_deformable_detr_config",
    "find_config_file",
    "load_config",
]
