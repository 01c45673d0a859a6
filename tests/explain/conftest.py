"""Tiny models of all five variants, with attention that differs from query to query."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.explain import Explanation, explain
from deformable_detr.layers import MSDeformAttn
from deformable_detr.loading import LoadedModel, load_model

VARIANTS = ("_single_scale", "_single_scale_dc5", "", "_box_refine", "_two_stage")
# The dilated stage needs the bottleneck blocks of a ResNet-50.
THIN_RESNET_50 = ("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8")
THIN_RESNET_50 += ("MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "4")


@pytest.fixture
def load_tiny(tiny_yaml) -> Callable[..., LoadedModel]:
    """A function (variant) -> a tiny model with random weights."""

    def load(variant: str = "", *, fresh_attention: bool = False, **opts: object) -> LoadedModel:
        _, config, *tiny = tiny_yaml(variant)
        if variant == "_single_scale_dc5":
            tiny += THIN_RESNET_50
        torch.manual_seed(0)
        loaded = load_model(config, "", opts=[*tiny, *(str(part) for pair in opts.items() for part in pair)])
        if not fresh_attention:
            for module in loaded.model.modules():
                if isinstance(module, MSDeformAttn):
                    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.5)
                    torch.nn.init.normal_(module.attention_weights.weight)
        return loaded

    return load


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    """100 x 80 pixels of noise, which the tiny models see at 80 x 64."""
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def explanation(load_tiny, image_file) -> Iterator[Explanation]:
    """Of the model with box refinement, whose random weights detect everything with a score of about 1 %."""
    yield explain(load_tiny("_box_refine"), image_file, detections=3, score=0.0)
