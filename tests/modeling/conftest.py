"""A Deformable DETR small enough to build and run in milliseconds, and inputs for it."""

import gc

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, Instances
from torch import nn

from deformable_detr.layers import PositionEmbeddingSine
from deformable_detr.modeling import (
    DETR,
    ContrastiveDenoising,
    DeformableDETR,
    DeformableTransformer,
    DenseTransformer,
    HungarianMatcher,
    MultiScaleBackbone,
    SetCriterion,
    SoftmaxClassification,
)


class _TinyBackbone(Backbone):
    """Three 3x3 convolutions with strides 8, 16 and 32, named like a ResNet's stages."""

    def __init__(self, channels=(8, 12, 16)):
        super().__init__()
        self.res3 = nn.Conv2d(3, channels[0], 9, stride=8, padding=4)
        self.res4 = nn.Conv2d(channels[0], channels[1], 3, stride=2, padding=1)
        self.res5 = nn.Conv2d(channels[1], channels[2], 3, stride=2, padding=1)
        self.shapes = {f"res{i + 3}": ShapeSpec(channels=c, stride=8 * 2**i) for i, c in enumerate(channels)}

    def output_shape(self):
        return self.shapes

    def forward(self, x):
        res3 = self.res3(x).relu()
        res4 = self.res4(res3).relu()
        return {"res3": res3, "res4": res4, "res5": self.res5(res4)}


def _make_model(*, levels=4, in_features=("res3", "res4", "res5"), d_model=32, n_heads=4, **options):
    criterion = {"aux_loss": options.pop("aux_loss", True)}
    names = (
        "num_queries",
        "num_queries_test",
        "num_one2many_queries",
        "shared_heads",
        "num_classes",
        "size_divisibility",
        "padding_invariant",
    )
    head = {"num_classes": 5, "num_queries": 11} | {name: options.pop(name) for name in names if name in options}
    denoising = options.pop("denoising", None)
    torch.manual_seed(0)
    model = DeformableDETR(
        backbone=MultiScaleBackbone(
            _TinyBackbone(), in_features=in_features, hidden_dim=d_model, num_feature_levels=levels
        ),
        position_embedding=PositionEmbeddingSine(d_model),
        transformer=DeformableTransformer(
            **{
                "d_model": d_model,
                "n_heads": n_heads,
                "num_encoder_layers": 1,
                "num_decoder_layers": 3,
                "dim_feedforward": 48,
                "dropout": 0.0,
                "num_feature_levels": levels,
                **options,
            }
        ),
        criterion=SetCriterion(HungarianMatcher(), **criterion),
        **head,
        denoising=denoising and ContrastiveDenoising(num_classes=head["num_classes"], embed_dim=d_model, **denoising),
    )
    return model


@pytest.fixture
def make_model():
    """Build a tiny model: levels, in_features, d_model, n_heads, num_queries, denoising (a dictionary), ... and the
    transformer's arguments."""
    return _make_model


def _make_detr(*, d_model=32, num_queries=11, num_classes=5, aux_loss=True, **transformer):
    sizes = {"n_heads": 4, "num_encoder_layers": 1, "num_decoder_layers": 3, "dim_feedforward": 48, "dropout": 0.0}
    softmax = SoftmaxClassification()
    torch.manual_seed(0)
    return DETR(
        backbone=MultiScaleBackbone(
            _TinyBackbone(), in_features=["res5"], hidden_dim=d_model, num_feature_levels=1, norm=""
        ),
        position_embedding=PositionEmbeddingSine(d_model, offset=0.0),
        transformer=DenseTransformer(**{"d_model": d_model, **sizes, **transformer}),
        criterion=SetCriterion(
            HungarianMatcher(cost_class=1.0, classification=softmax),
            class_weight=1.0,
            classification=softmax,
            aux_loss=aux_loss,
        ),
        num_classes=num_classes,
        num_queries=num_queries,
    )


@pytest.fixture
def make_detr():
    """Build a tiny DETR: d_model, num_queries, num_classes, aux_loss and the transformer's arguments."""
    return _make_detr


@pytest.fixture
def tiny_backbone():
    """Outputs res3, res4, res5 with 8, 12, 16 channels and strides 8, 16, 32."""
    return _TinyBackbone()


def _randomize(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture
def randomize():
    """Give every parameter a random value: freshly initialised box heads ignore the image."""
    return _randomize


def _make_input(height, width, boxes=(), classes=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "file_name": f"{height}x{width}.png", "image_id": seed}


@pytest.fixture
def make_input():
    """One image of noise with ground truth: (height, width, boxes as xyxy pixels, classes, seed)."""
    return _make_input


def _memory_of_graphs():
    gc.collect()
    torch.cuda.empty_cache()
    return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] != (0, 0))


@pytest.fixture
def memory_of_graphs():
    """A function that returns the bytes that the pools of CUDA graphs have reserved."""
    return _memory_of_graphs
