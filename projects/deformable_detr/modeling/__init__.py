from .backbone import MultiScaleBackbone, build_multi_scale_backbone, dilate_res5
from .bottom_ups import (
    build_regnet_backbone,
    build_swin,
    build_swin_backbone,
    build_vit_pyramid,
    build_vit_pyramid_backbone,
)
from .classification import FocalClassification, SoftmaxClassification
from .criterion import SetCriterion
from .deform_conv import deformable_stages
from .deformable_detr import DeformableDETR
from .denoising import ContrastiveDenoising
from .dense_transformer import DenseTransformer
from .detector import SetPredictionDetector
from .detr import DETR
from .inference import prepare_for_inference
from .matcher import HungarianMatcher
from .timm_backbone import TimmBackbone
from .transformer import DeformableTransformer

__all__ = [
    "ContrastiveDenoising",
    "DETR",
    "DeformableDETR",
    "DeformableTransformer",
    "DenseTransformer",
    "FocalClassification",
    "HungarianMatcher",
    "MultiScaleBackbone",
    "SetCriterion",
    "SetPredictionDetector",
    "SoftmaxClassification",
    "TimmBackbone",
    "build_multi_scale_backbone",
    "build_regnet_backbone",
    "build_swin",
    "build_swin_backbone",
    "build_vit_pyramid",
    "build_vit_pyramid_backbone",
    "deformable_stages",
    "dilate_res5",
    "prepare_for_inference",
]
