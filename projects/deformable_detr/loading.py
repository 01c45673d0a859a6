"""A trained model by name, configuration or output folder: where every tool beside train_net.py starts."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import detectron2.data.transforms as T
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model as build_yaml_model
from omegaconf import DictConfig

from .cli import check_device
from .config import RunConfig, load_config
from .data.augmentation import augmentation_from_config
from .data.datasets import get_class_names
from .model_zoo import default_weights
from .modeling import SetPredictionDetector
from .training.checkpointer import DeformableDETRCheckpointer
from .training.precision import DTYPES as SHORT_DTYPES
from .wording import name_first

# Of a computation, by name.
DTYPES = {"float32": torch.float32, **SHORT_DTYPES}


@dataclass(frozen=True)
class LoadedModel:
    """A model and what surrounds it when it detects.

    Attributes:
        model: in evaluation mode, on its device.
        cfg: the configuration it was built from.
        class_names: of the model's outputs; "class 0", "class 1", ... where nobody has stored names.
        resize: what the configuration does to an image (H, W, 3) before the model sees it.
    """

    model: SetPredictionDetector
    cfg: CfgNode | DictConfig
    class_names: list[str]
    resize: T.Augmentation


def load_model(
    model: str | os.PathLike,
    weights: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
    opts: Sequence[str] = (),
) -> LoadedModel:
    """Build a model and load its weights.

    Args:
        model: a name of :func:`model_zoo.list_models`, a config file, or the output folder of a training, whose
            ``config.yaml`` and last checkpoint are taken.
        weights: file or address, in place of the published ones, the config's or the folder's last; "" keeps the
            random initialisation.
        opts: overrides of the config.

    Raises:
        FileNotFoundError: if there is no such config or checkpoint.
        KeyError: if ``opts`` name no key of the config.
        CheckpointError: if the weights cannot be read, or leave a part of the model as initialised.
        ValueError: if ``model`` is neither a file or folder nor a name of the model zoo, if ``device`` is none that
            PyTorch has here, if ``opts`` are values that their keys cannot take, if a LazyConfig does not say how its
            evaluation resizes images.
    """
    check_device(device)
    model = os.fspath(model)
    cfg = load_config(model, opts)
    weights = default_weights(model, RunConfig(cfg, opts)) if weights is None else os.fspath(weights)
    resize = _resize(cfg)
    built = build_model(cfg, device).eval()
    # Without names of ours: what the outputs mean is for the file to say, and only then for the config's dataset.
    checkpointer = DeformableDETRCheckpointer(built, weights_key="--weights")
    if weights:
        checkpointer.load_to_detect(weights)
    names = checkpointer.class_names or get_class_names(cfg) or [None] * built.num_classes
    names = [name or f"class {index}" for index, name in enumerate(names)]
    return LoadedModel(built, cfg, names, resize)


def class_index(name: str, class_names: Sequence[str]) -> int:
    """Return the index of a class of the model.

    Raises:
        ValueError: the model has no such class; names close ones, or all.
    """
    if name in class_names:
        return list(class_names).index(name)
    close = difflib.get_close_matches(name, class_names, cutoff=0.75)
    hint = f"did you mean {' or '.join(close)}" if close else f"it knows {name_first(class_names, limit=20)}"
    raise ValueError(f"class {name!r} is not one of the model's {len(class_names)} classes: {hint}")


def build_model(cfg: CfgNode | DictConfig, device: str | torch.device = "cpu") -> SetPredictionDetector:
    """Build the model that a configuration of either kind describes, with random weights."""
    if (model := RunConfig(cfg).lazy_node("model")) is not None:
        return instantiate(model).to(device)
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = str(device)
    return build_yaml_model(cfg)


def _resize(cfg: CfgNode | DictConfig) -> T.Augmentation:
    run = RunConfig(cfg)
    if run.lazy_node("model") is None:
        return T.AugmentationList(augmentation_from_config(cfg, is_train=False))
    augmentations = run.lazy_node("dataloader.test.mapper.augmentations")
    if augmentations is None:
        raise ValueError(
            "the configuration has no dataloader.test.mapper.augmentations, which say how images are resized for the "
            "model: give a list of Detectron2's augmentations, or [] for not at all"
        )
    return T.AugmentationList(instantiate(augmentations))
