"""Models of timm as backbones."""

import json
import sys
from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from deformable_detr import load_config
from deformable_detr.checkpoint import convert
from deformable_detr.modeling import MultiScaleBackbone, TimmBackbone
from deformable_detr.modeling.padding_invariance import check_invariance
from deformable_detr.solver import layer_factors

timm = pytest.importorskip("timm")

CONFIGS = Path(__file__).parents[2] / "configs" / "backbones"
SWIN = {"strict_img_size": False, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}


@pytest.mark.parametrize(
    "name, out_features, channels, options",
    [
        ("convnext_atto", [8, 16, 32], [80, 160, 320], {}),
        ("resnet18", [4, 32], [64, 512], {}),
        ("efficientnet_b0", ["blocks.2", 16], [40, 112], {}),
        ("swin_tiny_patch4_window7_224", [8, 16], [24, 48], SWIN),
        ("vit_tiny_patch16_224", [16], [192], {"dynamic_img_size": True, "depth": 2}),
    ],
)
def test_outputs_are_what_the_shapes_say_and_all_that_is_built_is_used(name, out_features, channels, options):
    backbone = TimmBackbone(name, out_features=out_features, **options)
    shapes = backbone.output_shape()
    assert [shape.channels for shape in shapes.values()] == channels
    for name, feature in backbone.eval()(torch.rand(1, 3, 96, 128)).items():
        assert feature.shape[1:] == (shapes[name].channels, 96 // shapes[name].stride, 128 // shapes[name].stride)
    assert backbone.size_divisibility == max(shape.stride for shape in shapes.values())
    adaptor = MultiScaleBackbone(backbone, in_features=list(shapes), num_feature_levels=len(shapes), hidden_dim=32)
    assert adaptor.unused_parameters() == []


def test_options_of_a_yaml_file_reach_timm(tmp_path):
    path = tmp_path / "swin.yaml"
    path.write_text(
        f"_BASE_: {CONFIGS / 'deformable_detr_convnext_tiny.yaml'}\n"
        "MODEL: {DEFORMABLE_DETR: {BOTTOM_UP: timm/swin_tiny_patch4_window7_224, IN_FEATURES: [4, 8]}, "
        f"TIMM: {{OPTIONS: {json.dumps(SWIN)}}}}}\n"
    )
    backbone = BACKBONE_REGISTRY.get("build_multi_scale_backbone")(load_config(str(path)), ShapeSpec(channels=3))
    assert [project[0].in_channels for project in backbone.input_proj[:2]] == [12, 24]


def test_timms_files_load_by_their_names():
    saved = timm.create_model("convnext_atto")
    for parameter in saved.parameters():
        nn.init.normal_(parameter)
    model = nn.ModuleDict({"backbone": MultiScaleBackbone(TimmBackbone("convnext_atto"), in_features=[8, 16, 32])})
    converted, _ = convert(dict(saved.state_dict()), model=model)
    model.load_state_dict(converted, strict=False)
    for name, parameter in model["backbone"].bottom_up.body.model.named_parameters():
        assert torch.equal(parameter, saved.state_dict()[name]), name


@pytest.mark.parametrize("frozen_bn", [True, False])
def test_batch_norms_are_frozen_unless_they_are_wanted(frozen_bn):
    backbone = TimmBackbone("resnet18", out_features=[4], frozen_bn=frozen_bn)
    assert any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()) == (not frozen_bn)


def test_the_stem_and_the_first_stages_are_frozen():
    def frozen(freeze_at: int) -> set[str]:
        backbone = TimmBackbone("convnext_atto", freeze_at=freeze_at)
        names = [name for name, p in backbone.body.model.named_parameters() if not p.requires_grad]
        return {".".join(name.split(".")[: 1 if name.startswith("stem") else 2]) for name in names}

    assert [frozen(freeze_at) for freeze_at in (0, 1, 3)] == [set(), {"stem"}, {"stem", "stages.0", "stages.1"}]


def test_each_block_of_a_convnext_learns_slower_than_the_next():
    model = nn.ModuleDict({"backbone": MultiScaleBackbone(TimmBackbone("convnext_atto"), in_features=[8, 16, 32])})
    factors = layer_factors(model, 0.5)
    names = "backbone.bottom_up.body.model."
    # 2, 2, 6 and 2 blocks; what halves the resolution before a stage goes with the block before it.
    assert factors[f"{names}stages.3.blocks.1.conv_dw.weight"] == 0.5
    assert factors[f"{names}stages.1.blocks.0.conv_dw.weight"] == 0.5**10
    assert factors[f"{names}stages.1.downsample.0.weight"] == factors[f"{names}stages.0.blocks.1.gamma"] == 0.5**11
    assert factors[f"{names}stem.0.weight"] == 0.5**13


def test_a_convnext_can_be_padding_invariant_and_a_swin_cannot():
    check_invariance(MultiScaleBackbone(TimmBackbone("convnext_atto"), in_features=[8, 16, 32]))
    swin = TimmBackbone("swin_tiny_patch4_window7_224", **SWIN)
    with pytest.raises(ValueError, match="padding_invariant .* of this TimmBackbone changes with the canvas"):
        check_invariance(MultiScaleBackbone(swin, in_features=[8, 16, 32]))


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModuleNotFoundError, match="timm/convnext_tiny needs the package timm: pip install timm"):
        TimmBackbone("convnext_tiny")


def test_a_model_that_timm_does_not_have_is_named():
    with pytest.raises(ValueError, match="has no model 'convnext_tinny'"):
        TimmBackbone("convnext_tinny")
