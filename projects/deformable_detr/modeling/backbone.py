"""Any Detectron2 backbone in, L feature maps of equal width out."""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet
from torch import Tensor, nn
from torch.func import functional_call

from ..layers.precision import wide
from ..layers.tuned import in_convolution_layout
from .deform_conv import use_torchvision_deform_conv
from .features import find_features
from .frozen_bn import fold_frozen_batch_norm
from .timm_backbone import TimmBackbone, build_timm_backbone

# Pixels: enough for a stride of 64.
_PROBE_SIDE = 128


class MultiScaleBackbone(Backbone):
    """Projects backbone features to one width and adds coarser levels (Deformable DETR, appendix A.2).

    Each feature of ``in_features`` passes a 1x1 convolution and GroupNorm. Further levels come from 3x3 stride-2
    convolutions: the first one on the *raw* last feature, the next ones on the level before.

    Args:
        bottom_up: the backbone that computes ``in_features``.
        in_features: its outputs, finest first, by name or by stride.
        hidden_dim: channels of every output level.
        num_feature_levels: number L of output levels, at least ``len(in_features)``.
        norm: of the projections: "GN", or "" for none, as in DETR.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str | int] = ("res3", "res4", "res5"),
        hidden_dim: int = 256,
        num_feature_levels: int = 4,
        norm: str = "GN",
    ) -> None:
        super().__init__()
        shapes = bottom_up.output_shape()
        in_features = find_features({name: shape.stride for name, shape in shapes.items()}, in_features)
        if num_feature_levels < len(in_features):
            raise ValueError(
                f"num_feature_levels ({num_feature_levels}) must be at least the number of in_features "
                f"({len(in_features)}: {', '.join(in_features)})"
            )
        strides = [shapes[name].stride for name in in_features]
        if strides != sorted(strides):
            raise ValueError(
                f"in_features must be finest first, as every level stands for larger objects than the one before; "
                f"got {', '.join(in_features)} with strides {strides}"
            )
        self.bottom_up = fold_frozen_batch_norm(use_torchvision_deform_conv(bottom_up))
        self.in_features = tuple(in_features)
        self.hidden_dim = hidden_dim
        self.num_feature_levels = num_feature_levels

        if norm not in ("GN", ""):
            raise ValueError(f'the norm of the projections must be "GN" or "" for none, got {norm!r}')

        channels = [shapes[name].channels for name in in_features]
        projections = [_projection(c, hidden_dim, kernel_size=1, norm=norm) for c in channels]
        for level in range(len(in_features), num_feature_levels):
            in_channels = channels[-1] if level == len(in_features) else hidden_dim
            projections.append(_projection(in_channels, hidden_dim, kernel_size=3, norm=norm))
            strides.append(strides[-1] * 2)
        self.input_proj = nn.ModuleList(projections)
        self._levels = {f"level{i}": ShapeSpec(channels=hidden_dim, stride=s) for i, s in enumerate(strides)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level, finest first."""
        return dict(self._levels)

    @property
    def size_divisibility(self) -> int:
        """What ``bottom_up`` needs: 0 for a ResNet, whose batches are then padded exactly like the official code's."""
        return canvas_divisibility(self.bottom_up)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Args: x: (N, 3, H, W). Returns: ``{"level0": (N, hidden_dim, H_0, W_0), ...}``, finest level first."""
        features = self._bottom_up_features(x)
        raw = [features[name] for name in self.in_features]
        levels = [project(feature) for project, feature in zip(self.input_proj, raw, strict=False)]
        source = raw[-1]
        for project in self.input_proj[len(raw) :]:
            source = project(source)
            levels.append(source)
        return dict(zip(self._levels, levels, strict=True))

    def _bottom_up_features(self, x: Tensor) -> dict[str, Tensor]:
        # Other backbones may not take any layout.
        if isinstance(self.bottom_up, ResNet):
            return self.bottom_up(in_convolution_layout(x))
        if wide(x.dtype) is x.dtype or isinstance(self.bottom_up, TimmBackbone):
            return self.bottom_up(x)
        # Detectron2's Swin adds float32 masks to whatever it computes in, which autocast alone puts right.
        with torch.autocast(x.device.type, dtype=x.dtype):
            features = self.bottom_up(x)
        return {name: feature.to(x.dtype) for name, feature in features.items()}

    def unused_parameters(self) -> list[str]:
        """Names of trainable parameters that no level depends on, as ``bottom_up`` has more than it needs for them.

        Found by one pass of a small image, which leaves batch statistics and random numbers as they were.
        """
        parameters = {name: p for name, p in self.bottom_up.named_parameters() if p.requires_grad}
        if not parameters:
            return []
        device = next(self.bottom_up.parameters()).device
        multiple = _cell_divisibility(self.bottom_up) or 1
        side = math.ceil(_PROBE_SIDE / multiple) * multiple
        buffers = {name: buffer.clone() for name, buffer in self.bottom_up.named_buffers()}
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            features = functional_call(self.bottom_up, buffers, torch.zeros(1, 3, side, side, device=device))
            total = sum(features[name].float().sum() for name in self.in_features)
            gradients = [None] * len(parameters)
            if total.requires_grad:  # Else those that are trained all come behind the outputs in use.
                gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        return [f"bottom_up.{name}" for name, gradient in pairs if gradient is None]


def canvas_divisibility(backbone: Backbone) -> int:
    """Return what the sides of a padded batch must be multiples of for a backbone; 0 where any size will do.

    Detectron2 0.6 has no ``padding_constraints``, and later versions' Swin has a ``size_divisibility`` that raises.
    A "square_size" among the constraints is the side to which all images are padded, the one multiple that is not
    smaller than they.
    """
    return _padding_wishes(backbone).get("square_size") or _cell_divisibility(backbone)


def _cell_divisibility(backbone: Backbone) -> int:
    """Return the multiple that a backbone's own arithmetic needs, whatever canvas it was trained on."""
    wishes = _padding_wishes(backbone)
    # The second is how Detectron2's SimpleFeaturePyramid spells it.
    multiple = wishes.get("size_divisibility") or wishes.get("size_divisiblity")
    return multiple or getattr(backbone, "size_divisibility", 0)


def _padding_wishes(backbone: Backbone) -> dict[str, int]:
    return getattr(backbone, "padding_constraints", None) or {}


def _projection(in_channels: int, hidden_dim: int, *, kernel_size: int, norm: str) -> nn.Sequential:
    """1x1 projection, or 3x3 with stride 2, and GroupNorm; convolution initialised as in the official code.

    DETR's own code, which has no norm here, leaves the convolution as PyTorch initialises it.
    """
    conv = nn.Conv2d(in_channels, hidden_dim, kernel_size, stride=(kernel_size + 1) // 2, padding=kernel_size // 2)
    if not norm:
        return nn.Sequential(conv)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    # 32 groups wherever a group keeps two channels: a 1x1 map of one image has no variance within a single one.
    groups = 32 if hidden_dim % 32 == 0 and hidden_dim > 32 else math.gcd(32, hidden_dim // 2)
    return nn.Sequential(conv, nn.GroupNorm(groups, hidden_dim))


def dilate_res5(resnet: ResNet) -> ResNet:
    """Turn a bottleneck ResNet into one of the same blocks whose last stage is the official DC5 stage.

    Stride 2 becomes dilation 2 in every 3x3 convolution *after* the first block, as torchvision does and as the
    released weights were trained. Detectron2's own ``RES5_DILATION: 2`` also dilates the first block, which changes
    the features of the same weights (by up to 39 on a scale of 224).
    """
    if not hasattr(resnet, "res5") or not hasattr(resnet.res5[0], "conv3"):
        raise ValueError("dilate_res5 needs a ResNet with bottleneck blocks and a res5 stage")
    first = resnet.res5[0]
    for conv in (first.conv1, *_spatial_convolutions(first), first.shortcut):
        conv.stride = (1, 1)
    first.stride = 1
    for index, block in enumerate(resnet.res5):
        dilation = 1 if index == 0 else 2
        for conv in _spatial_convolutions(block):
            conv.dilation = conv.padding = (dilation, dilation)
    # A new one works out its strides anew.
    return ResNet(resnet.stem, [[*stage] for stage in resnet.stages], out_features=[*resnet.output_shape()])


def _spatial_convolutions(block: nn.Module) -> list[nn.Module]:
    """The 3x3 convolution of a bottleneck and, where it is deformable, the one that computes its offsets."""
    return [conv for name, conv in block.named_children() if name in ("conv2", "conv2_offset")]


def project_node(cfg: CfgNode) -> CfgNode:
    """Return the section of a configuration that holds this project's keys.

    Raises:
        KeyError: naming the call that adds it, where a tool of another project has made the configuration without it.
    """
    if "DEFORMABLE_DETR" not in cfg.MODEL:
        raise KeyError(
            "the configuration has no MODEL.DEFORMABLE_DETR: call deformable_detr.add_deformable_detr_config(cfg) "
            "right after get_cfg(), before a file is merged into it"
        )
    return cfg.MODEL.DEFORMABLE_DETR


@BACKBONE_REGISTRY.register()
def build_multi_scale_backbone(cfg, input_shape: ShapeSpec) -> MultiScaleBackbone:
    """Build :class:`MultiScaleBackbone` on ``MODEL.DEFORMABLE_DETR.BOTTOM_UP``: a registered backbone, or timm/NAME."""
    node = project_node(cfg)
    if node.BOTTOM_UP.startswith("timm/"):
        bottom_up = build_timm_backbone(cfg, node.BOTTOM_UP.removeprefix("timm/"), node.IN_FEATURES)
    else:
        bottom_up = BACKBONE_REGISTRY.get(node.BOTTOM_UP)(cfg, input_shape)
    if isinstance(bottom_up, ResNet) and cfg.MODEL.RESNETS.RES5_DILATION == 2:
        bottom_up = dilate_res5(bottom_up)
    return MultiScaleBackbone(
        bottom_up,
        in_features=node.IN_FEATURES,
        hidden_dim=node.HIDDEN_DIM,
        num_feature_levels=node.NUM_FEATURE_LEVELS,
        norm=node.PROJECTION_NORM,
    )
