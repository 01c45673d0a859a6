"""Models and configurations by name, as in Detectron2's own model zoo."""

import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from ..config import RunConfig, find_config_file, load_config
from ..training.checkpointer import DeformableDETRCheckpointer, last_checkpoint
from .records import MODELS, RECIPES, check_name, find_model


def list_models() -> list[str]:
    """Names of the published models, from the simplest to the best, then of the recipes without weights."""
    return [*MODELS, *RECIPES]


def get_config_file(name: str, *, suffix: str = ".yaml") -> str:
    """Return the path of a model's configuration.

    Args:
        suffix: ".yaml", or ".py" for the LazyConfig.

    Raises:
        KeyError: if there is no such model.
        ValueError: if the configurations are neither installed with the package nor beside it in a checkout.
    """
    check_name(name)
    return find_config_file(name, suffix=suffix)


def get_config(
    name: str, trained: bool = False, *, suffix: str = ".yaml", opts: Sequence[str] = ()
) -> CfgNode | DictConfig:
    """Return a model's configuration.

    Args:
        trained: set the published weights in place of the ImageNet backbone that training starts from.
        suffix: ".yaml" for a CfgNode, ".py" for a LazyConfig.
        opts: overrides, as for :func:`deformable_detr.load_config`.
    """
    cfg = load_config(get_config_file(name, suffix=suffix), opts)
    if trained:
        RunConfig(cfg).set("weights", find_model(name).weights)
    return cfg


def default_weights(model: str, run: RunConfig) -> str:
    """Return the weights with which a model detects where the user names none.

    Args:
        model: a name of :func:`list_models`, a config file, or the output folder of a training.
        run: its configuration; weights among the user's overrides are taken first.

    Returns:
        The published weights, or the last checkpoint of the folder; those of the configuration for a file, and for a
        name without published ones.

    Raises:
        FileNotFoundError: if the folder holds no checkpoint.
    """
    if not run.overridden("weights"):
        if os.path.isdir(model):
            return last_checkpoint(model)
        if model in MODELS:
            return MODELS[model].weights
    return run.get("weights")


def get(name: str, trained: bool = False, device: str | torch.device = "cpu") -> nn.Module:
    """Build a model for the 80 COCO classes, in evaluation mode.

    Args:
        trained: load the published weights, downloading them the first time; else the model keeps its random
            initialisation and nothing is downloaded.

    Raises:
        KeyError: if there is no such model, or no weights of it.
        CheckpointError: if the weights cannot be had; says how to get them by hand.
    """
    cfg = get_config(name, trained)
    cfg.MODEL.DEVICE = str(device)
    model = build_model(cfg)
    if trained:
        DeformableDETRCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model.eval()
