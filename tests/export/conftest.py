"""Tiny models of all variants, with random weights that answer to the image; programs that are captured once."""

import logging

import pytest
import torch

from deformable_detr.export import exporter
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


@pytest.fixture(scope="session")
def models():
    """What ``tiny_model`` has built, by its arguments."""
    return {}


@pytest.fixture(scope="session")
def programs():
    """What ``capture`` has recorded, by model and arguments."""
    return {}


@pytest.fixture
def tiny_model(tiny_yaml, models):
    """A function (variant, *opts) -> LoadedModel with images of 64 to 96 pixels, the same for the same arguments."""

    def load(variant="", *opts):
        if variant == "_two_stage":
            # More than 64 queries, which the reference runtime's own GatherElements cannot choose from.
            opts = "MODEL.DEFORMABLE_DETR.NUM_QUERIES", "70", *opts
        key = (variant, *opts)
        if key not in models:
            _, path, *tiny = tiny_yaml(variant)
            loaded = load_model(path, "", opts=[*tiny, *(NARROW_RESNET_50 if "dc5" in variant else ()), *opts])
            randomise(loaded.model)
            models[key] = loaded
        return models[key]

    return load


@pytest.fixture
def short_model(tiny_model):
    """As ``tiny_model``, with half of the backbone and levels: the time of an export is that of its operations."""

    def load(variant, *opts):
        levels = "1" if "single_scale" in variant or variant.startswith("detr") else "2"
        res3 = "MODEL.RESNETS.OUT_FEATURES", "['res3']", "MODEL.DEFORMABLE_DETR.IN_FEATURES", "['res3']"
        return tiny_model(variant, *res3, "MODEL.DEFORMABLE_DETR.NUM_FEATURE_LEVELS", levels, *opts)

    return load


@pytest.fixture
def capture(programs, monkeypatch):
    """``export.program.capture``, of which the exporter too gets what was captured before: it is most of the time."""
    real = exporter.capture

    def capture_once(program, shape, *, decompose):
        key = program.model, shape, decompose
        if key not in programs:
            programs[key] = real(program, shape, decompose=decompose)
        return programs[key]

    monkeypatch.setattr(exporter, "capture", capture_once)
    return capture_once
