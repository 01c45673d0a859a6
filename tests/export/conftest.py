"""Tiny models of all variants with random weights that answer to the image."""

import logging

import pytest
import torch

from deformable_detr.loading import load_model

# Only ResNets with bottlenecks can be dilated.
NARROW_RESNET_50 = "MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8".split()


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Freshly initialised heads give all queries the same scores; these do not."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            embedding = "embed" in name and parameter.shape[0] <= 20
            parameter.copy_(noise if embedding else noise / parameter[0].numel() ** 0.5)
        elif "norm" not in name:
            parameter.copy_(noise * 0.2)


@pytest.fixture(autouse=True)
def no_trace_records(monkeypatch):
    """pytest would collect all of PyTorch's records about tracing, which takes longer than the tracing."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


@pytest.fixture
def tiny_model(tiny_yaml):
    """A function (variant, *opts) -> LoadedModel with images of 64 to 96 pixels."""

    def load(variant="", *opts):
        _, path, *tiny = tiny_yaml(variant)
        loaded = load_model(path, "", opts=[*tiny, *(NARROW_RESNET_50 if "dc5" in variant else ()), *opts])
        randomise(loaded.model)
        return loaded

    return load
