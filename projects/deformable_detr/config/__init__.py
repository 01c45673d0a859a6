"""Configurations of both of Detectron2's systems: the keys, reading and overriding them."""

from .keys import add_deformable_detr_config
from .load import (
    find_config_file,
    get_device,
    get_output_dir,
    get_value,
    load_config,
    overridden_keys,
    set_value,
    weights_key,
)

__all__ = [
    "add_deformable_detr_config",
    "find_config_file",
    "get_device",
    "get_output_dir",
    "get_value",
    "load_config",
    "overridden_keys",
    "set_value",
    "weights_key",
]
