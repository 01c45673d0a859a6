"""Deformable DETR for Detectron2. Importing this package registers its models and ``deformable-detr://``, no more.

Where Detectron2 is not installed there is ``deformable_detr.layers`` alone, which needs nothing but PyTorch.
"""

import warnings
from importlib.util import find_spec

from . import layers

__version__ = "0.1.0"
__all__ = ["layers"]

if find_spec("detectron2") is not None:
    with warnings.catch_warnings():
        # fvcore and Detectron2 call it while they are imported; the user can do nothing about that.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        from . import model_zoo, modeling  # modeling registers DeformableDETR and build_multi_scale_backbone
        from .config import add_deformable_detr_config, load_config
        from .modeling import prepare_for_inference

    model_zoo.register_handler()
    __all__ += ["add_deformable_detr_config", "load_config", "model_zoo", "modeling", "prepare_for_inference"]
