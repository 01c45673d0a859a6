"""Pretrained backbones of any architecture, whatever prefix a file or the model puts before their names."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from torch import Tensor, nn

from deformable_detr.checkpoint import CheckpointError, convert
from deformable_detr.modeling import MultiScaleBackbone
from deformable_detr.training.checkpointer import DeformableDETRCheckpointer


class Named(Backbone):
    """A module that has parameters of the given names and shapes, below modules as their names say."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *parents, last = name.split(".")
            module = self
            for parent in parents:
                if parent not in dict(module.named_children()):
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            if last == "relative_position_index":
                module.register_buffer(last, torch.arange(math.prod(shape)).view(shape))
            else:
                module.register_parameter(last, nn.Parameter(torch.full(shape, float("nan"))))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"p": ShapeSpec(channels=8, stride=8)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise AssertionError("nothing is computed with names")


def layer(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def swin(window: int = 4) -> dict[str, tuple[int, ...]]:
    """The names of Detectron2's Swin; its norms on the outputs are in no file."""
    names = layer("patch_embed.proj", 8, 3, 4, 4) | layer("patch_embed.norm", 8)
    for block in ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"):
        names |= layer(f"{block}.norm1", 8) | layer(f"{block}.norm2", 8) | layer(f"{block}.attn.qkv", 24, 8)
        names |= layer(f"{block}.attn.proj", 8, 8) | layer(f"{block}.mlp.fc1", 32, 8) | layer(f"{block}.mlp.fc2", 8, 32)
        names[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, 2)
        names[f"{block}.attn.relative_position_index"] = (window**2, window**2)
    return names | {"layers.0.downsample.reduction.weight": (16, 32)} | layer("layers.0.downsample.norm", 32)


def vit(prefix: str = "", *, grid: int = 3) -> dict[str, tuple[int, ...]]:
    """The names of Detectron2's ViT, of grid x grid patches and a class token."""
    names = {"pos_embed": (1, 1 + grid**2, 8)} | layer("patch_embed.proj", 8, 3, 16, 16)
    for i in range(3):
        names |= layer(f"blocks.{i}.norm1", 8) | layer(f"blocks.{i}.norm2", 8) | layer(f"blocks.{i}.attn.qkv", 24, 8)
        names |= layer(f"blocks.{i}.attn.proj", 8, 8) | layer(f"blocks.{i}.mlp.fc1", 32, 8)
        names |= layer(f"blocks.{i}.mlp.fc2", 8, 32)
    return {f"{prefix}{name}": shape for name, shape in names.items()}


def relative(prefix: str, *, length: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}blocks.{i}.attn.rel_pos_{axis}": (length, 4) for i in range(3) for axis in "hw"}


def mvit() -> dict[str, tuple[int, ...]]:
    """The names of Detectron2's MViTv2, without its norms on the outputs."""
    names = vit() | relative("", length=7)
    del names["pos_embed"]
    for i in range(3):
        names |= {f"blocks.{i}.attn.pool_{part}.weight": (4, 1, 3, 3) for part in "qkv"}
        for part in "qkv":
            names |= layer(f"blocks.{i}.attn.norm_{part}", 4)
    return names | layer("blocks.1.proj", 8, 8)


def values(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        is_index = name.endswith("relative_position_index")
        return torch.arange(math.prod(shape)).view(shape) if is_index else torch.rand(shape)

    return {name: fill(name, shape) for name, shape in shapes.items()}


@pytest.fixture
def with_backbone(build):
    """A function (backbone) -> a small detector on it."""

    def make(backbone: Backbone, feature: str = "p") -> nn.Module:
        model = build("_single_scale")
        model.backbone = MultiScaleBackbone(backbone, in_features=[feature], hidden_dim=64, num_feature_levels=1)
        return model

    return make


def load(model: nn.Module, content: dict, path) -> DeformableDETRCheckpointer:
    torch.save(content, path)
    checkpointer = DeformableDETRCheckpointer(model)
    checkpointer.load(str(path))
    return checkpointer


def assert_taken(model: nn.Module, weights: dict[str, Tensor], *, below: str) -> None:
    module = model.get_submodule(below)
    assert {k for k, v in weights.items() if not torch.equal(module.state_dict()[k], v)} == set()


def in_the_backbone(missing: dict[str, str]) -> set[str]:
    prefix = "backbone.bottom_up."
    return {key.removeprefix(prefix) for key in missing if key.startswith(prefix)}


def test_swin_file_loads_and_the_norms_on_the_outputs_stay_as_initialised(with_backbone, tmp_path):
    norms = layer("norm0", 8) | layer("norm1", 8)
    model = with_backbone(Named(**swin(), **norms))
    weights = values(swin())
    unused = values({"layers.0.blocks.1.attn_mask": (2, 2), **layer("norm", 8), **layer("head", 10, 8)})
    report = load(model, {"model": weights | unused}, tmp_path / "swin.pth").report
    assert_taken(model, weights, below="backbone.bottom_up")
    assert in_the_backbone(report.missing) == set(norms)
    assert report.dropped == dict.fromkeys(unused, "the model has no such parameter")


def test_mae_file_of_a_vit_loads_below_the_pyramid(with_backbone, tmp_path):
    absent = layer("simfp_2.0", 8, 4) | layer("simfp_3.0.norm", 4) | relative("net.", length=5)
    model = with_backbone(Named(**vit("net."), **absent))
    weights = values(vit())
    report = load(model, {"model": weights | {"cls_token": torch.ones(1, 1, 8)}}, tmp_path / "mae.pth").report
    assert_taken(model, weights, below="backbone.bottom_up.net")
    assert in_the_backbone(report.missing) == set(absent) and list(report.dropped) == ["cls_token"]


def test_mvit_file_of_pyth_loads(with_backbone, tmp_path):
    norms = layer("scale2_norm", 8) | layer("scale5_norm", 8)
    model = with_backbone(Named(**mvit(), **norms))
    weights = values(mvit())
    content = {"model_state": weights | values(layer("norm", 8)), "optimizer_state": {}, "epoch": 299, "cfg": "text"}
    assert in_the_backbone(load(model, content, tmp_path / "mvit.pyth").report.missing) == set(norms)
    assert_taken(model, weights, below="backbone.bottom_up")


def regnet() -> RegNet:
    return RegNet(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        depth=5,
        w_a=8.0,
        w_0=8,
        w_m=2.0,
        group_width=8,
        out_features=["s1", "s2"],
    )


def test_regnet_file_of_pyth_gives_the_features_of_its_model(with_backbone, tmp_path):
    theirs = regnet().eval()
    for tensor in theirs.state_dict().values():
        tensor.copy_(torch.rand_like(tensor.float()) + 0.5)
    model = with_backbone(regnet(), "s2")
    weights = theirs.state_dict() | values(layer("head.fc", 10, 8))
    load(model, {"model_state": weights, "epoch": 99}, tmp_path / "regnet.pyth")
    image = torch.rand(1, 3, 64, 64)
    model.eval()
    torch.testing.assert_close(model.backbone.bottom_up(image)["s2"], theirs(image)["s2"])


@pytest.mark.parametrize("prefix", ("module.", "backbone.", "module.encoder_q.", "backbone.bottom_up."))
@pytest.mark.parametrize("names", ("Detectron2", "torchvision"))
def test_a_resnet_loads_whatever_one_prefix_its_names_have(build, official_names, prefix, names):
    theirs, ours = build(), build()
    expected = {k: v for k, v in theirs.state_dict().items() if k.startswith("backbone.bottom_up.")}
    spelled = expected if names == "Detectron2" else official_names(theirs)
    stem = "backbone.bottom_up." if names == "Detectron2" else "backbone.0.body."
    weights = {prefix + k.removeprefix(stem): v for k, v in spelled.items() if k.startswith(stem)}
    heads = values(layer("roi_heads.box_head.fc1", 8, 8))
    converted, report = convert(weights | heads, model=ours)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)
    assert set(report.dropped) == set(heads)


def test_a_backbone_with_a_hole_is_refused(build, with_backbone):
    backbone = values(swin())
    without_a_block = {k: v for k, v in backbone.items() if not k.startswith("layers.1.blocks.1.")}
    with pytest.raises(CheckpointError, match=r"14 missing in the file: backbone\.bottom_up\.layers\.1\.blocks\.1\."):
        convert(without_a_block, model=with_backbone(Named(**swin())))
    without_a_stage = {k: v for k, v in backbone.items() if not k.startswith("layers.1.")}
    with pytest.raises(CheckpointError, match="28 missing in the file"):
        convert(without_a_stage, model=with_backbone(Named(**swin())))
    resnet = {k: v for k, v in build().state_dict().items() if k.startswith("backbone.bottom_up.res")}
    with pytest.raises(CheckpointError, match=r"5 missing in the file: backbone\.bottom_up\.res4\.5\.conv3\.weight"):
        convert({k: v for k, v in resnet.items() if ".res4.5.conv3" not in k} | stem(build()), model=build())


def stem(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.startswith("backbone.bottom_up.stem.")}


def test_a_backbone_that_is_mostly_absent_is_refused(with_backbone):
    few = {k: v for k, v in values(swin()).items() if k.startswith("patch_embed.")}
    with pytest.raises(CheckpointError, match="missing in the file"):
        convert(few, model=with_backbone(Named(**swin())))


def test_a_backbone_of_another_width_is_refused_and_one_of_another_family_is_not_taken_for_ours(with_backbone):
    wide = {name: torch.rand(tuple(2 * size for size in shape)) for name, shape in swin().items()}
    with pytest.raises(CheckpointError, match="of another shape"):
        convert(wide, model=with_backbone(Named(**swin())))
    with pytest.raises(CheckpointError, match="torchvision ResNet names.* missing in the file"):
        convert(torchvision.models.resnet18(weights=None).state_dict(), model=with_backbone(Named(**swin())))


def test_position_tables_of_another_size_are_interpolated(with_backbone):
    model = with_backbone(Named(**vit("net.", grid=4), **relative("net.", length=5)))
    weights = values(vit(grid=2) | relative("", length=3))
    weights["blocks.0.attn.rel_pos_h"] = torch.tensor([0.0, 1.0, 2.0])[:, None].expand(3, 4)
    converted, report = convert(weights, model=model)
    # Centres of 5 cells in the frame of 3: -0.2, 0.4, 1.0, 1.6, 2.2, clipped to [0, 2].
    expected = torch.tensor([0, 0.4, 1, 1.6, 2])[:, None].expand(5, 4)
    torch.testing.assert_close(converted["backbone.bottom_up.net.blocks.0.attn.rel_pos_h"], expected)
    table = converted["backbone.bottom_up.net.pos_embed"]
    assert torch.equal(table[:, 0], weights["pos_embed"][:, 0])  # the class token
    grid = weights["pos_embed"][:, 1:].view(1, 2, 2, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(table[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 16, 8))
    assert report.mapped["backbone.bottom_up.net.pos_embed"] == "position table interpolated, (1, 5, 8) -> (1, 17, 8)"
    assert len(report.mapped) == 7


def test_swin_of_another_window_gets_its_tables_interpolated_and_keeps_its_own_index(with_backbone):
    model = with_backbone(Named(**swin(window=4)))
    weights = values(swin(window=2))
    for name in weights:
        if name.endswith("table"):
            weights[name] = torch.full_like(weights[name], 0.5)
    converted, report = convert(weights, model=model)
    stem = "backbone.bottom_up.layers.0.blocks.0.attn.relative_position_"
    # Constant tables stay constant, also where a bicubic curve has to be continued.
    torch.testing.assert_close(converted[f"{stem}bias_table"], torch.full((49, 2), 0.5))
    assert f"{stem}index" not in converted and f"{stem}index" in report.missing
    assert len(in_the_backbone(report.missing)) == 4


@pytest.mark.parametrize("query", ("?matching_heuristics=True", "?matching_heuristics=true&ema=False"))
def test_detectron2s_way_to_ask_for_matched_names_is_understood(build, tmp_path, query):
    theirs, ours = build(), build()
    torch.save(theirs.backbone.bottom_up.state_dict(), tmp_path / "R-50.pth")
    DeformableDETRCheckpointer(ours).load(f"{tmp_path}/R-50.pth{query}")
    assert_taken(ours, theirs.backbone.bottom_up.state_dict(), below="backbone.bottom_up")
