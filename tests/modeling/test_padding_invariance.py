"""Detections of an image that depend on nothing but the image."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import ResNet
from torch import nn

from deformable_detr import load_config, prepare_for_inference
from deformable_detr.modeling.padding_invariance import MaskedPadding, check_invariance
from deformable_detr.modeling.proposals import block_padding

VARIANTS = ["_single_scale", "_single_scale_dc5", "", "_box_refine", "_two_stage"]
DETR = "configs/COCO-Detection/detr_R_50.yaml"
# The first block has then a 1x1 convolution right behind the pooling, as bottlenecks have, where nothing is masked.
NARROW_STEM = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "32"]
BOTTLENECKS = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"]


def build(arguments: list[str], *, invariant: bool = True):
    """A model whose every part leaves its mark: norms and heads of a new one hide what padding does."""
    _, path, *opts = arguments
    opts += ["MODEL.DEFORMABLE_DETR.PADDING_INVARIANT", str(invariant)]
    opts += BOTTLENECKS if "dc5" in path else []
    torch.manual_seed(0)
    model = build_model(load_config(path, opts)).eval()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.0), module.bias.uniform_(-0.3, 0.3)
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone.bottom_up."):
            nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(params=[*VARIANTS, DETR], ids=[*VARIANTS, "detr"])
def arguments(request, tiny_yaml):
    if request.param in VARIANTS:
        return tiny_yaml(request.param)
    flag, _, *opts = tiny_yaml()
    return [flag, DETR, *opts]


@pytest.fixture
def batches(make_input):
    """The same image first in a batch alone, beside a larger one, and beside a wide and a high one."""
    image = make_input(70, 45)
    return [[image], [image, make_input(90, 130, seed=1)], [image, make_input(30, 200, seed=2), make_input(150, 20)]]


def test_an_image_is_computed_as_if_it_were_alone_on_every_canvas_and_beside_every_image(arguments, batches):
    model, plain = build(arguments), build(arguments, invariant=False)
    # What a model computes for an image that fills its canvas, with nothing masked.
    alone, beside = [plain.predict_raw(batch) for batch in batches[:2]]
    assert (beside["pred_logits"][:, 0] - alone["pred_logits"][:, 0]).abs().max() > 0.01
    for outputs in [model.predict_raw(batch) for batch in batches]:
        for key in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(outputs[key][:, 0], alone[key][:, 0], rtol=0, atol=1e-5)


def test_a_1x1_convolution_behind_the_pooling_finds_nothing_infinite(tiny_yaml, batches):
    """DETR's attention would multiply it by weights of zero."""
    flag, _, *opts = tiny_yaml()
    model = build([flag, DETR, *opts, *BOTTLENECKS])
    alone, beside = [model.predict_raw(batch)["pred_logits"] for batch in batches[:2]]
    torch.testing.assert_close(beside[:, 0], alone[:, 0], rtol=0, atol=1e-5)


def test_without_the_key_nothing_is_masked(tiny_yaml, batches, monkeypatch):
    model = build(tiny_yaml("_two_stage"), invariant=False)
    monkeypatch.setattr(MaskedPadding, "__init__", lambda *_: pytest.fail("entered"))
    assert model.size_divisibility == 0
    model.predict_raw(batches[1])


def test_canvases_are_whole_strides(make_model):
    model = make_model(padding_invariant=True)
    assert model.size_divisibility == 64
    assert model.preprocess_image([{"image": torch.zeros(3, 65, 5)}]).tensor.shape[-2:] == (128, 64)
    assert make_model(padding_invariant=True, size_divisibility=48).size_divisibility == 192


def test_proposals_of_padding_count_for_nothing(tiny_yaml, batches):
    """The image has fewer cells than there are queries: 63 + 15 + 6 + 2 at strides of 8 to 64."""
    model = build([*tiny_yaml("_two_stage"), "MODEL.DEFORMABLE_DETR.NUM_QUERIES", "150"])
    found = [model.predict_raw(batch) for batch in batches[:2]]
    cells = 9 * 6 + 5 * 3 + 3 * 2 + 2 * 1
    for outputs in found:
        logits = outputs["pred_logits"][:, 0]
        assert (logits[:, :cells] > -100).all() and (logits[:, cells:] == -1e4).all()
    torch.testing.assert_close(
        found[0]["pred_logits"][:, 0, :cells], found[1]["pred_logits"][:, 0, :cells], rtol=0, atol=1e-5
    )
    alone, beside = [model(batch)[0]["instances"] for batch in batches[:2]]
    torch.testing.assert_close(alone.pred_boxes.tensor, beside.pred_boxes.tensor, rtol=0, atol=1e-3)


def test_a_prepared_copy_is_as_invariant(tiny_yaml, batches):
    model = build(tiny_yaml("_two_stage"))
    prepared = prepare_for_inference(model)
    expected = model(batches[0])[0]["instances"]
    for batch in batches:
        found = prepared(batch)[0]["instances"]
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_it_trains(tiny_yaml, make_input, norm):
    opts = ["MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.NORM", norm]
    model = build([*tiny_yaml("_two_stage"), *NARROW_STEM, *opts]).train()
    boxes, classes = [[5, 5, 40, 60]], [1]
    losses = model([make_input(70, 45, boxes, classes), make_input(90, 130, boxes, classes)])
    sum(losses.values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_group_norm_leaves_padding_out():
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 4, 4) + 1
    with MaskedPadding((32, 32), torch.tensor([[32, 32], [17, 8]])):
        found = norm(x)
    torch.testing.assert_close(found[0], norm(x[:1])[0])
    torch.testing.assert_close(found[1, :, :3, :1], norm(x[1:, :, :3, :1])[0])


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 3, 3, padding=1)],
    ids=lambda pool: type(pool).__name__,
)
def test_what_looks_at_neighbours_sees_the_border_of_the_image(pool):
    x = -torch.rand(1, 2, 8, 8) - 1
    with MaskedPadding((64, 64), torch.tensor([[40, 25]])):
        found = pool(x)
    expected = pool(x[:, :, :5, :4])
    torch.testing.assert_close(found[:, :, : expected.shape[2], : expected.shape[3]], expected)
    assert found.isfinite().all()


def test_queries_of_padding_are_seen_by_themselves_alone():
    others_first = torch.tensor([[False, True, False], [False, False, False], [True, False, False]])
    found = block_padding(others_first, torch.tensor([[False, True], [True, False]]), num_heads=2)
    seen_by_nobody_else = [
        [[False, True, True], [False, False, True], [True, False, False]],
        [[False, True, False], [False, False, False], [True, True, False]],
    ]
    assert found[::2].tolist() == seen_by_nobody_else
    assert torch.equal(found[::2], found[1::2])


@pytest.mark.parametrize(
    "stem, opts",
    [("R_50_dcn_v2", []), ("R_50_fpn", []), ("regnetx_4gf", ["MODEL.REGNET.SE_RATIO", "0.25"])],
    ids=["dcn_v2", "fpn", "regnety"],
)
def test_features_of_backbones_that_convolve_are_invariant(stem, opts):
    cfg = load_config(f"configs/backbones/deformable_detr_{stem}.yaml", opts)
    check_invariance(BACKBONE_REGISTRY.get("build_multi_scale_backbone")(cfg, ShapeSpec(channels=3)))


def test_a_backbone_whose_features_depend_on_the_canvas_is_refused(tiny_yaml, monkeypatch):
    def with_mean_of_the_canvas(self, x):
        return {name: x - x.mean((2, 3), keepdim=True) for name, x in forward(self, x).items()}

    forward = ResNet.forward
    monkeypatch.setattr(ResNet, "forward", with_mean_of_the_canvas)
    with pytest.raises(
        ValueError, match=r"padding_invariant is for .*: level0 of this ResNet changes with the canvas by"
    ):
        build(tiny_yaml())


def test_a_backbone_whose_features_are_not_finite_at_padding_is_refused(tiny_backbone, monkeypatch):
    def with_logarithm(self, x):
        features = forward(self, x)
        return features | {"res3": features["res3"] + nn.functional.avg_pool2d(x[:, :1], 8).log()}

    forward = type(tiny_backbone).forward
    monkeypatch.setattr(type(tiny_backbone), "forward", with_logarithm)
    with pytest.raises(ValueError, match=r"res3 of this _TinyBackbone is not finite where there is padding"):
        check_invariance(tiny_backbone)


def test_checking_leaves_model_and_random_numbers_alone(tiny_backbone):
    state = {name: value.clone() for name, value in tiny_backbone.state_dict().items()}
    before = torch.get_rng_state()
    check_invariance(tiny_backbone)
    assert torch.equal(torch.get_rng_state(), before) and tiny_backbone.training
    assert all(torch.equal(value, state[name]) for name, value in tiny_backbone.state_dict().items())
