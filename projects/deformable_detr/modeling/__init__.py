from .backbone import MultiScaleBackbone, build_multi_scale_backbone, dilate_res5
from .criterion import SetCriterion
from .deformable_detr import DeformableDETR
from .deformable_transformer import DeformableTransformer
from .matcher import HungarianMatcher

__all__ = [
    "DeformableDETR",
    "DeformableTransformer",
    "HungarianMatcher",
    "MultiScaleBackbone",
    "SetCriterion",
    "build_multi_scale_backbone",
    "dilate_res5",
]
