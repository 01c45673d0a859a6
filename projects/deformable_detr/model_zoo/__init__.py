"""The published models by name: ``get``, ``get_config``, ``list_models``, and weights as ``deformable-detr://<name>``."""

from .download import register_handler
from .records import MODELS, PublishedModel
from .zoo import default_weights, get, get_config, get_config_file, list_models

__all__ = [
    "MODELS",
    "PublishedModel",
    "default_weights",
    "get",
    "get_config",
    "get_config_file",
    "list_models",
    "register_handler",
]
