"""Data for DETR training: datasets and their checks, augmentation, loading, evaluators."""

from .augmentation import augmentation_from_config, build_detr_augmentation
from .datasets import check_dataset_files, get_class_names, get_train_dicts, register_coco_data
from .evaluators import build_evaluator, check_evaluator
from .loader import TrainLoader
from .mapper import NamedErrorsMapper
from .sampler import repeat_factor_sampler, sampler_from_config

__all__ = [
    "NamedErrorsMapper",
    "TrainLoader",
    "augmentation_from_config",
    "build_detr_augmentation",
    "build_evaluator",
    "check_dataset_files",
    "check_evaluator",
    "get_class_names",
    "get_train_dicts",
    "register_coco_data",
    "repeat_factor_sampler",
    "sampler_from_config",
]
