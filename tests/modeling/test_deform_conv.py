"""Deformable convolution in ResNets: Detectron2's names, torchvision's operator."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import DeformConv, ModulatedDeformConv
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem
from torch import nn

from deformable_detr.checkpoint import convert
from deformable_detr.modeling import MultiScaleBackbone, deformable_stages, dilate_res5
from deformable_detr.modeling.deform_conv import TorchvisionDeformConv, use_torchvision_deform_conv


def build_resnet(*, modulated: bool, **options) -> ResNet:
    torch.manual_seed(0)
    stages = deformable_stages(50, modulated=modulated, norm="FrozenBN", **options)
    return ResNet(BasicStem(norm="FrozenBN"), stages, out_features=["res5"]).eval()


def test_the_first_version_equals_detectron2s_bit_for_bit():
    theirs = build_resnet(modulated=False)
    for block in theirs.res5:
        nn.init.normal_(block.conv2_offset.weight, std=0.01)
    ours = use_torchvision_deform_conv(copy.deepcopy(theirs))
    assert isinstance(theirs.res5[0].conv2, DeformConv) and isinstance(ours.res5[0].conv2, TorchvisionDeformConv)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(ours(image)["res5"], theirs(image)["res5"])


def test_the_second_version_shifts_by_its_offsets_and_scales_by_its_mask():
    conv = ModulatedDeformConv(2, 3, 3, padding=1, groups=1, bias=True, activation=torch.relu)
    nn.init.normal_(conv.bias)
    x = torch.randn(1, 2, 5, 7)
    # One cell down and two to the left, for each of the nine taps.
    offset = torch.tensor([1.0, -2.0]).repeat(9).view(1, 18, 1, 1).expand(1, 18, 5, 7)
    found = TorchvisionDeformConv(conv)(x, offset, torch.full((1, 9, 5, 7), 0.25))
    expected = F.conv2d(x, conv.weight * 0.25, conv.bias, padding=1).relu()
    # Where both see no border: what is at (y, x) is the convolution at (y + 1, x - 2).
    torch.testing.assert_close(found[:, :, :3, 3:], expected[:, :, 1:4, 1:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_its_inputs_and_outputs_alone(dtype):
    conv = TorchvisionDeformConv(DeformConv(2, 3, 3, padding=1)).to(dtype)
    x, offset = torch.randn(1, 2, 5, 7).to(dtype), torch.randn(1, 18, 5, 7).to(dtype)
    found = conv(x, offset)
    assert found.dtype == dtype
    assert torch.equal(found, conv.float()(x.float(), offset.float()).to(dtype))


def test_it_starts_as_the_convolution_it_stands_for_with_half_of_it_in_the_second_version():
    for modulated, factor in ((False, 1.0), (True, 0.5)):
        block = use_torchvision_deform_conv(build_resnet(modulated=modulated)).res3[1]
        hidden = torch.rand(1, 128, 6, 8)
        offsets = block.conv2_offset(hidden)
        parts = (offsets[:, :18], offsets[:, 18:].sigmoid()) if modulated else (offsets,)
        expected = factor * F.conv2d(hidden, block.conv2.weight, padding=1)
        torch.testing.assert_close(block.conv2(hidden, *parts), block.conv2.norm(expected))


def test_weights_of_detectron2s_detectors_load():
    saved = build_resnet(modulated=True)
    for parameter in saved.parameters():
        nn.init.normal_(parameter, std=0.1)
    weights = {f"backbone.bottom_up.{name}": value.clone() for name, value in saved.state_dict().items()}
    assert "backbone.bottom_up.res3.0.conv2_offset.weight" in weights
    weights |= {"backbone.fpn_lateral5.weight": torch.rand(256, 2048, 1, 1), "roi_heads.box_predictor.b": torch.rand(5)}

    backbone = MultiScaleBackbone(build_resnet(modulated=True), in_features=["res5"], num_feature_levels=1)
    model = nn.ModuleDict({"backbone": backbone})
    converted, _ = convert(weights, model=model)
    model.load_state_dict(converted, strict=False)
    for name, value in saved.state_dict().items():
        assert torch.equal(backbone.bottom_up.state_dict()[name], value), name


def test_the_last_stage_is_dilated_with_its_offsets():
    resnet = dilate_res5(use_torchvision_deform_conv(build_resnet(modulated=True)))
    last = resnet.res5[2]
    assert last.conv2.dilation == last.conv2.padding == last.conv2_offset.dilation == (2, 2)
    assert resnet.output_shape()["res5"].stride == 16
    assert resnet(torch.randn(1, 3, 64, 96))["res5"].shape[-2:] == (4, 6)


def test_deformable_stages_need_bottlenecks():
    with pytest.raises(ValueError, match="depth must be 50 or more, got 18"):
        deformable_stages(18)
