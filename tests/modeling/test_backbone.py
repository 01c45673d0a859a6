import pytest
import torch
import torchvision
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.structures import ImageList

from deformable_detr.checkpoint import convert
from deformable_detr.modeling import MultiScaleBackbone, dilate_res5


def build_resnet(depth=50, **stage_options):
    stages = ResNet.make_default_stages(depth, norm="FrozenBN", **stage_options)
    return ResNet(BasicStem(norm="FrozenBN"), stages, out_features=["res5"]).eval()


def test_extra_levels_come_from_the_raw_last_feature(tiny_backbone):
    backbone = MultiScaleBackbone(tiny_backbone, hidden_dim=64, num_feature_levels=5)
    image = torch.randn(2, 3, 128, 96)
    levels = backbone(image)
    assert [tuple(f.shape[1:]) for f in levels.values()] == [
        (64, 16, 12),
        (64, 8, 6),
        (64, 4, 3),
        (64, 2, 2),
        (64, 1, 1),
    ]
    raw = backbone.bottom_up(image)["res5"]
    torch.testing.assert_close(levels["level3"], backbone.input_proj[3](raw))
    torch.testing.assert_close(levels["level4"], backbone.input_proj[4](levels["level3"]))
    assert [s.stride for s in backbone.output_shape().values()] == [8, 16, 32, 64, 128]


def test_a_backbone_other_than_a_resnet_gets_the_images_in_their_own_layout(tiny_backbone):
    layouts = []
    tiny_backbone.register_forward_pre_hook(lambda module, inputs: layouts.append(inputs[0].is_contiguous()))
    MultiScaleBackbone(tiny_backbone, hidden_dim=64)(torch.randn(2, 3, 64, 96))
    assert layouts == [True]


def test_parameters_that_no_level_depends_on_are_named():
    resnet = ResNet(
        BasicStem(norm="BN"), ResNet.make_default_stages(18, norm="BN"), out_features=["res3", "res4", "res5"]
    )
    res5 = {f"bottom_up.res5.{name}" for name, _ in resnet.res5.named_parameters()}
    state = {name: value.clone() for name, value in resnet.state_dict().items()}
    random_numbers = torch.get_rng_state()
    backbone = MultiScaleBackbone(resnet.freeze(2), in_features=["res3", "res4"])
    torch.set_rng_state(random_numbers)
    assert set(backbone.unused_parameters()) == res5
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(torch.equal(value, state[name]) for name, value in resnet.state_dict().items() if name in state)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert MultiScaleBackbone(resnet).unused_parameters() == []
    # What comes before an output that is used is used.
    assert MultiScaleBackbone(resnet, in_features=["res5"]).unused_parameters() == []


def test_projection_starts_with_zero_bias_and_xavier_weights(tiny_backbone):
    backbone = MultiScaleBackbone(tiny_backbone, hidden_dim=64)
    conv = backbone.input_proj[3][0]
    bound = (6 / (16 * 9 + 64 * 9)) ** 0.5
    assert conv.bias.abs().max() == 0
    assert conv.weight.abs().max() <= bound
    assert conv.weight.abs().max() > 0.9 * bound


@pytest.mark.parametrize(("hidden_dim", "groups"), [(256, 32), (96, 32), (64, 32), (32, 16), (48, 8)])
def test_group_norm_has_32_groups_unless_too_few_channels(tiny_backbone, hidden_dim, groups):
    backbone = MultiScaleBackbone(tiny_backbone, hidden_dim=hidden_dim)
    assert backbone.input_proj[0][1].num_groups == groups


def test_unknown_in_feature_is_named(tiny_backbone):
    with pytest.raises(ValueError, match=r"res9.*res3.*res4.*res5"):
        MultiScaleBackbone(tiny_backbone, in_features=["res9"])


def test_features_that_are_not_finest_first_are_refused(tiny_backbone):
    with pytest.raises(ValueError, match=r"finest first.*got res5, res3, res4 with strides \[32, 8, 16\]"):
        MultiScaleBackbone(tiny_backbone, in_features=["res5", 8, "res4"])


def test_fewer_levels_than_features_is_refused(tiny_backbone):
    with pytest.raises(ValueError, match=r"num_feature_levels \(2\).*3: res3, res4, res5"):
        MultiScaleBackbone(tiny_backbone, num_feature_levels=2)


@pytest.mark.parametrize("dilation", [False, True], ids=["resnet", "dc5"])
def test_resnet50_equals_torchvision_bit_for_bit(dilation):
    torch.manual_seed(0)
    reference = torchvision.models.resnet50(
        norm_layer=torchvision.ops.FrozenBatchNorm2d, replace_stride_with_dilation=[False, False, dilation]
    ).eval()
    resnet = build_resnet(stride_in_1x1=False)
    resnet = dilate_res5(resnet) if dilation else resnet
    model = torch.nn.ModuleDict({"backbone": torch.nn.ModuleDict({"bottom_up": resnet})})
    converted, _ = convert(reference.state_dict(), model=model)
    model.load_state_dict(converted, strict=False)
    image = torch.randn(1, 3, 97, 64)
    body = torchvision.models._utils.IntermediateLayerGetter(reference, {"layer4": "0"})
    assert torch.equal(resnet(image)["res5"], body(image)["0"])
    assert resnet.output_shape()["res5"].stride == (16 if dilation else 32)


def test_dilation_needs_bottleneck_blocks():
    with pytest.raises(ValueError, match="bottleneck"):
        dilate_res5(build_resnet(depth=18))


def test_a_backbone_that_wants_square_images_gets_them(tiny_backbone, monkeypatch):
    monkeypatch.setattr(type(tiny_backbone), "padding_constraints", {"square_size": 96}, raising=False)
    backbone = MultiScaleBackbone(tiny_backbone)
    images = ImageList.from_tensors([torch.ones(3, 50, 80), torch.ones(3, 96, 20)], backbone.size_divisibility)
    assert images.tensor.shape[-2:] == (96, 96)


@pytest.mark.parametrize("square", [{}, {"square_size": 0}])
def test_a_backbone_may_ask_for_multiples_by_its_constraints_alone(tiny_backbone, monkeypatch, square):
    monkeypatch.setattr(type(tiny_backbone), "padding_constraints", {"size_divisibility": 48, **square}, raising=False)
    assert tiny_backbone.size_divisibility == 0
    assert MultiScaleBackbone(tiny_backbone).size_divisibility == 48


def test_a_backbone_whose_divisibility_cannot_be_read_needs_none(tiny_backbone, monkeypatch):
    monkeypatch.setattr(type(tiny_backbone), "size_divisibility", property(lambda self: self._size_divisibility))
    with pytest.raises(AttributeError):
        _ = tiny_backbone.size_divisibility
    assert MultiScaleBackbone(tiny_backbone).size_divisibility == 0
