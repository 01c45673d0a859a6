"""Backbones of every kind under the adaptor: their outputs, what of them is frozen, and how fast they learn."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import nn

from deformable_detr import load_config, prepare_for_inference
from deformable_detr.data.augmentation import ResizeShortestEdge
from deformable_detr.modeling import MultiScaleBackbone
from deformable_detr.modeling.features import find_features
from deformable_detr.solver import build_optimizer

CONFIGS = Path(__file__).parents[2] / "configs" / "backbones"
# Outputs of each backbone: channels of the levels before the projections, finest first.
CHANNELS = {
    "R_18": [128, 256, 512],
    "R_34": [128, 256, 512],
    "R_101": [512, 1024, 2048],
    "R_50_dcn_v1": [512, 1024, 2048],
    "R_50_dcn_v2": [512, 1024, 2048],
    "R_50_fpn": [256, 256, 256, 256],
    "regnetx_4gf": [240, 560, 1360],
    "swin_tiny": [192, 384, 768],
    "convnext_tiny": [192, 384, 768],
    "vit_base": [256, 256, 256],
}
STRIDES = [8, 16, 32, 64]
# Canvases of 1024 pixels would be of no use here.
SMALL_VIT = "EMBED_DIM 32 DEPTH 8 NUM_HEADS 2 IMG_SIZE 128 SQUARE_PAD 128".split()
SMALL = "ENC_LAYERS 1 DEC_LAYERS 1 DIM_FEEDFORWARD 16 HIDDEN_DIM 32 NHEADS 2 NUM_QUERIES 5".split()


class FakeSwin(Backbone):
    """Takes the arguments of Detectron2's Swin and has its names, with one linear layer for each of its blocks."""

    def __init__(
        self,
        pretrain_img_size=224,
        patch_size=4,
        in_chans=3,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.2,
        ape=False,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
    ):
        super().__init__()
        self.options = {"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads, "window_size": window_size}
        self.options |= {"drop_path_rate": drop_path_rate}
        self.frozen_stages = frozen_stages
        self.out_indices = out_indices
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.layers = nn.ModuleList()
        self._out_features = [f"p{i}" for i in out_indices]
        self._out_feature_strides = {f"p{i}": 4 * 2**i for i in out_indices}
        self._out_feature_channels = {f"p{i}": embed_dim * 2**i for i in out_indices}
        for i, depth in enumerate(depths):
            stage = nn.Module()
            stage.blocks = nn.ModuleList(nn.Linear(embed_dim * 2**i, embed_dim * 2**i) for _ in range(depth))
            stage.downsample = nn.Linear(embed_dim * 2**i, 2 * embed_dim * 2**i) if i + 1 < len(depths) else None
            self.layers.append(stage)
        for i in out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(embed_dim * 2**i))

    @property
    def size_divisibility(self):
        return self._size_divisibility  # As there, where the attribute has another name.

    def forward(self, x):
        x = self.patch_embed.proj(x).permute(0, 2, 3, 1)
        outputs = {}
        for i, stage in enumerate(self.layers):
            mask = torch.zeros(*x.shape[1:3], 1, device=x.device)  # Not of the type of x, there neither.
            for block in stage.blocks:
                x = x + block(x + mask)
            if i in self.out_indices:
                outputs[f"p{i}"] = getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2)
            if stage.downsample is not None:
                x = stage.downsample(x[:, ::2, ::2])
        return outputs


class FakeViT(Backbone):
    """Takes the arguments of Detectron2's ViT and has its names, with one linear layer for each of its blocks."""

    def __init__(
        self,
        img_size=1024,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
        use_rel_pos=False,
        window_size=0,
        window_block_indexes=(),
        out_feature="last_feat",
    ):
        super().__init__()
        self.options = {"img_size": img_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        self.options |= {"drop_path_rate": drop_path_rate, "window_size": window_size, "use_rel_pos": use_rel_pos}
        self.options |= {"window_block_indexes": window_block_indexes, "eps": norm_layer(1).eps}
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, embed_dim, 1, 1))
        self.blocks = nn.ModuleList(nn.Conv2d(embed_dim, embed_dim, 1) for _ in range(depth))
        self._out_features, self._out_feature_strides = [out_feature], {out_feature: patch_size}
        self._out_feature_channels = {out_feature: embed_dim}

    def forward(self, x):
        x = self.patch_embed.proj(x) + self.pos_embed
        for block in self.blocks:
            x = x + block(x)
        return {self._out_features[0]: x}


class FakePyramid(Backbone):
    """As Detectron2's SimpleFeaturePyramid, with one layer on every level."""

    def __init__(self, net, in_feature, out_channels, scale_factors, top_block=None, norm="LN", square_pad=0):
        super().__init__()
        self.net, self.in_feature, self.square_pad = net, in_feature, square_pad
        shape = net.output_shape()[in_feature]
        strides = [int(shape.stride / scale) for scale in scale_factors]
        for stride, scale in zip(strides, scale_factors, strict=True):
            resize = nn.Upsample(scale_factor=scale) if scale > 1 else nn.MaxPool2d(int(1 / scale))
            layers = nn.Sequential(resize, nn.Conv2d(shape.channels, out_channels, 1))
            self.add_module(f"simfp_{stride.bit_length() - 1}", layers)
        self._out_features = [f"p{stride.bit_length() - 1}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def padding_constraints(self):
        return {"size_divisiblity": 32, "square_size": self.square_pad}  # As it is written there.

    def forward(self, x):
        x = self.net(x)[self.in_feature]
        return {name: getattr(self, f"simfp_{name[1:]}")(x) for name in self._out_features}


FAKES = {"swin": {"SwinTransformer": FakeSwin}, "vit": {"ViT": FakeViT, "SimpleFeaturePyramid": FakePyramid}}


@pytest.fixture
def main_branch(monkeypatch):
    """What Detectron2's main branch has and version 0.6 has not: stand-ins, where it is not installed."""
    for module, fakes in FAKES.items():
        name = f"detectron2.modeling.backbone.{module}"
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**fakes))


def small_cfg(stem: str, *opts: str) -> CfgNode:
    """The yaml file of a backbone under a tiny transformer."""
    pairs = zip(SMALL[::2], SMALL[1::2], strict=True)
    small = [word for key, value in pairs for word in (f"MODEL.DEFORMABLE_DETR.{key}", value)]
    if stem == "vit_base":
        pairs = zip(SMALL_VIT[::2], SMALL_VIT[1::2], strict=True)
        small += [word for key, value in pairs for word in (f"MODEL.VIT.{key}", value)]
    return load_config(str(CONFIGS / f"deformable_detr_{stem}.yaml"), ["MODEL.DEVICE", "cpu", *small, *opts])


@pytest.fixture(params=CHANNELS)
def stem(request, main_branch) -> str:
    if request.param == "convnext_tiny":
        pytest.importorskip("timm")
    return request.param


def test_every_backbone_of_the_folder_is_among_these():
    assert {path.stem.removeprefix("deformable_detr_") for path in CONFIGS.glob("*.yaml")} == CHANNELS.keys()


def test_every_backbone_detects_learns_and_has_parameter_groups(stem, make_input):
    torch.manual_seed(0)
    cfg = small_cfg(stem)
    model = build_model(cfg)
    levels = model.backbone.output_shape().values()
    assert [shape.stride for shape in levels] == STRIDES
    projections = [project[0].in_channels for project in model.backbone.input_proj]
    assert projections[: len(CHANNELS[stem])] == CHANNELS[stem]

    losses = model([make_input(70, 50, boxes=[[5, 5, 40, 60]], classes=[1])])
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == model.backbone.unused_parameters() == []
    model.eval()
    assert len(model([make_input(70, 50)])[0]["instances"]) == 100

    groups = {id(p): group for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        factor = 0.1 if name.startswith("backbone.bottom_up.") or "sampling_offsets" in name else 1.0
        factor = 0.1 if name.startswith("transformer.reference_points.") else factor
        assert (id(parameter) in groups) == parameter.requires_grad
        if parameter.requires_grad:
            assert groups[id(parameter)]["lr"] == pytest.approx(cfg.SOLVER.BASE_LR * factor), name


@pytest.mark.parametrize("stem", ["swin_tiny", "vit_base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_prepared_copy_detects_the_same_in_half_precision(stem, dtype, main_branch, make_input):
    torch.manual_seed(0)
    model = build_model(small_cfg(stem)).eval()
    batch = [make_input(70, 50), make_input(64, 96)]
    for expected, found in zip(model(batch), prepare_for_inference(model, dtype=dtype)(batch), strict=True):
        difference = expected["instances"].scores.cpu() - found["instances"].scores
        assert difference.abs().max() < 3e-3


def test_layers_of_outputs_that_no_level_comes_from_are_named():
    fpn = build_model(small_cfg("R_50_fpn", "MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']")).backbone
    fpn.in_features = ("p4", "p5", "p6")
    assert fpn.unused_parameters() == [
        f"bottom_up.{layer}.{name}" for layer in ("fpn_lateral3", "fpn_output3") for name in ("weight", "bias")
    ]


def test_a_norm_of_a_swin_whose_output_is_not_taken_is_named(main_branch):
    swin = instantiate(load_config(str(CONFIGS / "deformable_detr_swin_tiny.py")).model.backbone.bottom_up)
    backbone = MultiScaleBackbone(swin, in_features=[16, 32])
    assert backbone.unused_parameters() == ["bottom_up.norm1.weight", "bottom_up.norm1.bias"]


def test_the_first_stages_of_a_swin_are_frozen_as_in_detectron2(main_branch):
    for freeze_at, frozen_stages in ((0, -1), (1, 1), (2, 2)):
        cfg = small_cfg("swin_tiny", "MODEL.BACKBONE.FREEZE_AT", str(freeze_at))
        swin = BACKBONE_REGISTRY.get("build_swin_backbone")(cfg, ShapeSpec(channels=3))
        assert swin.frozen_stages == frozen_stages


def test_the_first_stages_of_a_regnet_are_frozen_as_in_detectron2():
    regnet = BACKBONE_REGISTRY.get("build_regnet_backbone")(small_cfg("regnetx_4gf"), ShapeSpec(channels=3))
    assert {name.split(".")[0] for name, p in regnet.named_parameters() if not p.requires_grad} == {"stem", "s1"}


def test_the_keys_of_a_swin_reach_it(main_branch):
    opts = "EMBED_DIM 8 DEPTHS [1,1,2] NUM_HEADS [1,2,4] WINDOW_SIZE 12 DROP_PATH_RATE 0.5".split()
    opts = [f"MODEL.SWIN.{word}" if word.isupper() else word for word in opts]
    cfg = small_cfg("swin_tiny", *opts, "MODEL.DEFORMABLE_DETR.IN_FEATURES", "['p1', 16]")
    swin = BACKBONE_REGISTRY.get("build_swin_backbone")(cfg, ShapeSpec(channels=3))
    assert swin.output_shape() == {"p1": ShapeSpec(channels=16, stride=8), "p2": ShapeSpec(channels=32, stride=16)}
    # Norms of outputs that nothing takes would never get a gradient.
    assert [name for name, _ in swin.named_children() if name.startswith("norm")] == ["norm1", "norm2"]
    if isinstance(swin, FakeSwin):
        assert swin.options == {
            "embed_dim": 8,
            "depths": (1, 1, 2),
            "num_heads": (1, 2, 4),
            "window_size": 12,
            "drop_path_rate": 0.5,
        }


def test_each_block_of_a_swin_learns_slower_than_the_next(main_branch):
    cfg = small_cfg("swin_tiny", "SOLVER.LAYER_DECAY", "0.5")
    model = build_model(cfg)
    lr = {id(p): group["lr"] for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    first, last = model.backbone.bottom_up.layers[0].blocks[0], model.backbone.bottom_up.layers[3].blocks[1]
    assert lr[id(next(last.parameters()))] == pytest.approx(cfg.SOLVER.BASE_LR * 0.1 * 0.5)
    # Twelve blocks.
    assert lr[id(next(first.parameters()))] == pytest.approx(cfg.SOLVER.BASE_LR * 0.1 * 0.5**12)


def test_twins_build_the_same_swin(main_branch):
    path = str(CONFIGS / "deformable_detr_swin_tiny.py")
    lazy = instantiate(load_config(path).model.backbone.bottom_up)
    swin = BACKBONE_REGISTRY.get("build_swin_backbone")(small_cfg("swin_tiny"), ShapeSpec(channels=3))
    assert lazy.output_shape() == swin.output_shape()
    assert [n for n, _ in lazy.named_parameters()] == [n for n, _ in swin.named_parameters()]
    assert lazy.frozen_stages == swin.frozen_stages
    if isinstance(swin, FakeSwin):
        assert lazy.options == swin.options


def test_the_keys_of_a_vit_reach_it(main_branch):
    cfg = small_cfg("vit_base", "MODEL.VIT.OUT_CHANNELS", "16", "MODEL.DEFORMABLE_DETR.IN_FEATURES", "['p3', 16]")
    pyramid = BACKBONE_REGISTRY.get("build_vit_pyramid_backbone")(cfg, ShapeSpec(channels=3))
    assert pyramid.output_shape() == {"p3": ShapeSpec(channels=16, stride=8), "p4": ShapeSpec(channels=16, stride=16)}
    if isinstance(pyramid, FakePyramid):
        assert pyramid.net.options == {
            "img_size": 128,
            "embed_dim": 32,
            "depth": 8,
            "num_heads": 2,
            "drop_path_rate": 0.1,
            "window_size": 14,
            "use_rel_pos": True,
            # Blocks 2, 4, 6 and 8 see the whole image.
            "window_block_indexes": [0, 2, 4, 6],
            "eps": 1e-6,
        }


def test_images_of_a_vit_are_padded_to_its_square(main_branch, make_input):
    for square, canvas in (("128", (128, 128)), ("0", (96, 64))):
        model = build_model(small_cfg("vit_base", "MODEL.VIT.SQUARE_PAD", square))
        assert model.preprocess_image([make_input(70, 50)]).tensor.shape[-2:] == canvas


def test_resized_images_fit_into_the_square_of_a_vit():
    """Rounded as officially, those of 32 to 1 become 16 pixels longer than they may be; twins have the same values."""
    cfg = load_config(str(CONFIGS / "deformable_detr_vit_base.yaml"))
    longest = [
        max(max(ResizeShortestEdge.get_output_shape(height, 3200, 480, limit)) for height in range(100, 3201))
        for limit in (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST)
    ]
    assert longest == [cfg.MODEL.VIT.SQUARE_PAD] * 2


def test_the_first_blocks_of_a_vit_are_frozen(main_branch):
    def frozen(freeze_at: int) -> set[str]:
        cfg = small_cfg("vit_base", "MODEL.BACKBONE.FREEZE_AT", str(freeze_at))
        net = BACKBONE_REGISTRY.get("build_vit_pyramid_backbone")(cfg, ShapeSpec(channels=3)).net
        names = [name for name, p in net.named_parameters() if not p.requires_grad]
        return {".".join(name.split(".")[: 2 if "blocks" in name else 1]) for name in names}

    embeddings = {"patch_embed", "pos_embed"}
    assert [frozen(n) for n in (0, 1, 3)] == [set(), embeddings, embeddings | {"blocks.0", "blocks.1"}]


def test_twins_build_the_same_vit(main_branch):
    lazy = instantiate(load_config(str(CONFIGS / "deformable_detr_vit_base.py")).model.backbone.bottom_up)
    cfg = load_config(str(CONFIGS / "deformable_detr_vit_base.yaml"))
    pyramid = BACKBONE_REGISTRY.get("build_vit_pyramid_backbone")(cfg, ShapeSpec(channels=3))
    assert lazy.output_shape() == pyramid.output_shape()
    assert lazy.padding_constraints == pyramid.padding_constraints
    assert [n for n, _ in lazy.named_parameters()] == [n for n, _ in pyramid.named_parameters()]
    if isinstance(pyramid, FakePyramid):
        assert lazy.net.options == pyramid.net.options


@pytest.mark.parametrize("stem, module, name", [("swin_tiny", "swin", "SwinTransformer"), ("vit_base", "vit", "ViT")])
def test_a_backbone_that_the_installed_detectron2_lacks_is_named_with_the_version_that_has_it(stem, module, name):
    if importlib.util.find_spec(f"detectron2.modeling.backbone.{module}") is not None:
        pytest.skip("this Detectron2 has it")
    with pytest.raises(ImportError, match=rf"Detectron2 \(0\.6\) has no {name}: .* on its main branch since June 2022"):
        build_model(small_cfg(stem))


def test_outputs_are_found_by_name_or_by_stride():
    strides = {"stem": 4, "res2": 4, "res3": 8}
    assert find_features(strides, ["stem", 8]) == ["stem", "res3"]
    assert find_features(strides, [4]) == ["res2"]
    with pytest.raises(
        ValueError, match=r"in_features \[16\] must name outputs .*: stem \(4\), res2 \(4\), res3 \(8\)"
    ):
        find_features(strides, [16])
    with pytest.raises(ValueError, match=r"in_features \[\] must"):
        find_features(strides, [])


def test_levels_are_chosen_by_stride(tiny_backbone):
    backbone = MultiScaleBackbone(tiny_backbone, in_features=[8, 32], num_feature_levels=3)
    assert backbone.in_features == ("res3", "res5")
    assert [shape.stride for shape in backbone.output_shape().values()] == [8, 32, 64]
