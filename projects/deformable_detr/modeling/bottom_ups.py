"""Backbones of Detectron2 for which it has no builder that yaml files can name."""

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import detectron2
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from torch import nn

from .backbone import project_node
from .features import find_features

# Pixels, of the published ViT-B, -L and their files.
_VIT_PATCH = 16


def build_swin(
    *,
    out_features: Sequence[str | int] = (8, 16, 32),
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    freeze_at: int = 0,
    **options: Any,
) -> Backbone:
    """Build the Swin Transformer of Detectron2's main branch (arXiv 2103.14030), by default Swin-T.

    Args:
        out_features: outputs, of "p0", "p1", ... or by strides of 4, 8, ...; no other has a norm of its own.
        depths, num_heads: blocks of every stage, and attention heads of each of its blocks.
        freeze_at: 1 freezes the embedding of patches, n more the first n - 1 stages; 0 nothing.
        options: further arguments of ``SwinTransformer``, such as ``embed_dim``, ``window_size``, ``drop_path_rate``.

    Raises:
        ImportError: if the installed Detectron2 has no Swin.
    """
    swin = _from_main_branch("swin", "SwinTransformer")
    names = find_features({f"p{i}": 4 * 2**i for i in range(len(depths))}, out_features)
    return swin(
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        out_indices=tuple(int(name[1:]) for name in names),
        # There, 0 freezes the embedding, and 1 the absolute positions too.
        frozen_stages=freeze_at or -1,
        **options,
    )


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a Swin Transformer from ``MODEL.SWIN``: :func:`build_swin`."""
    node = cfg.MODEL.SWIN
    return build_swin(
        out_features=project_node(cfg).IN_FEATURES,
        embed_dim=node.EMBED_DIM,
        depths=node.DEPTHS,
        num_heads=node.NUM_HEADS,
        window_size=node.WINDOW_SIZE,
        drop_path_rate=node.DROP_PATH_RATE,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


def build_vit_pyramid(
    *,
    out_features: Sequence[str | int] = (8, 16, 32),
    out_channels: int = 256,
    square_pad: int = 1024,
    depth: int = 12,
    freeze_at: int = 0,
    **options: Any,
) -> Backbone:
    """Build the ViT with the simple feature pyramid of Detectron2's main branch (arXiv 2203.16527), by default ViT-B.

    Of the blocks, which look at windows, four see the whole image, evenly spread, as in the paper.

    Args:
        out_features: levels of the pyramid, of "p2" to "p5" or by strides of 4 to 32, each twice the one before.
        out_channels: of every level.
        square_pad: side in pixels to which all images are padded, as in pre-training; 0 for canvases of any size.
        depth: blocks.
        freeze_at: 1 freezes the embedding of patches and of their positions, n more the first n - 1 blocks; 0 nothing.
        options: further arguments of ``ViT``, such as ``img_size``, ``embed_dim``, ``num_heads``, ``window_size``.

    Raises:
        ImportError: if the installed Detectron2 has no ViT.
    """
    vit, pyramid = (_from_main_branch("vit", name) for name in ("ViT", "SimpleFeaturePyramid"))
    strides = {f"p{i}": 2**i for i in (2, 3, 4, 5)}
    names = find_features(strides, out_features)
    net = vit(
        patch_size=_VIT_PATCH,
        depth=depth,
        window_block_indexes=[i for i in range(depth) if (i + 1) % max(1, depth // 4)],
        use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        out_feature="last_feat",
        **options,
    )
    _freeze_vit(net, freeze_at)
    return pyramid(
        net=net,
        in_feature="last_feat",
        out_channels=out_channels,
        scale_factors=[_VIT_PATCH / strides[name] for name in names],
        square_pad=square_pad,
    )


@BACKBONE_REGISTRY.register()
def build_vit_pyramid_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a ViT with its pyramid from ``MODEL.VIT``: :func:`build_vit_pyramid`."""
    node = cfg.MODEL.VIT
    return build_vit_pyramid(
        out_features=project_node(cfg).IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        square_pad=node.SQUARE_PAD,
        img_size=node.IMG_SIZE,
        embed_dim=node.EMBED_DIM,
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        window_size=node.WINDOW_SIZE,
        drop_path_rate=node.DROP_PATH_RATE,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_regnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RegNet:
    """Build a RegNet (arXiv 2003.13678) from ``MODEL.REGNET``, with the stem and the blocks of the published ones."""
    node = cfg.MODEL.REGNET
    strides = {"stem": 2, "s1": 4, "s2": 8, "s3": 16, "s4": 32}
    return RegNet(
        stem_class=SimpleStem,
        stem_width=node.STEM_WIDTH,
        block_class=ResBottleneckBlock,
        depth=node.DEPTH,
        w_a=node.W_A,
        w_0=node.W_0,
        w_m=node.W_M,
        group_width=node.GROUP_WIDTH,
        se_ratio=node.SE_RATIO,
        norm=node.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        out_features=find_features(strides, project_node(cfg).IN_FEATURES),
    )


def _freeze_vit(vit: nn.Module, freeze_at: int) -> None:
    first = ["patch_embed.", "pos_embed", *(f"blocks.{i}." for i in range(freeze_at - 1))]
    for name, parameter in vit.named_parameters():
        if freeze_at > 0 and name.startswith(tuple(first)):
            parameter.requires_grad = False


def _from_main_branch(module: str, name: str) -> Any:
    """Return a backbone of Detectron2 that version 0.6 is older than."""
    path = f"detectron2.modeling.backbone.{module}"
    try:
        return getattr(importlib.import_module(path), name)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise ImportError(
            f"the installed Detectron2 ({detectron2.__version__}) has no {name}: version 0.6 is older than {path}, "
            "which is on its main branch since June 2022 (python tools/install_detectron2.py --source ...)"
        ) from error
