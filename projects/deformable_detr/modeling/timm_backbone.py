"""Any model of timm as a backbone, where that package is installed."""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from .features import find_features


class TimmBackbone(Backbone):
    """A timm model without its classifier, by ``features_only``.

    Parameters keep timm's names, so that its files load.

    Args:
        name: of timm, such as "convnext_tiny".
        out_features: outputs, by strides or by names of timm's modules; nothing beyond the last of them is built.
        freeze_at: 1 freezes what timm counts as the stem, n more the first n - 1 stages (blocks of a ViT); 0 nothing.
        frozen_bn: batch norms compute with what the pre-trained file says, and do not learn.
        options: further arguments of ``timm.create_model``, such as ``drop_path_rate``; ``strict_img_size=False`` for a
            Swin, ``dynamic_img_size=True`` for a ViT.

    Raises:
        ModuleNotFoundError: where timm is missing, with the command that installs it.
        ValueError: if timm has no such model, or it has no such outputs.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str | int] = (8, 16, 32),
        freeze_at: int = 0,
        frozen_bn: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        timm = _import_timm(name)
        if not timm.is_model(name):
            raise ValueError(f"timm {timm.__version__} has no model {name!r}; timm.list_models() has all of them")
        # Only a model that is built says which outputs it has, and in which order.
        whole = timm.create_model(name, **options)
        infos = {info["module"]: info for info in getattr(whole.feature_info, "info", whole.feature_info)}
        names = find_features({module: info["reduction"] for module, info in infos.items()}, out_features)
        indices = [list(infos).index(module) for module in names]
        # The getter alone keeps the names of parameters.
        self.body = timm.create_model(name, features_only=True, feature_cls="getter", out_indices=indices, **options)
        if frozen_bn:
            self.body = timm.layers.freeze_batch_norm_2d(self.body)
        if freeze_at > 0:
            _freeze(self.body.model, timm.models.group_parameters(whole, whole.group_matcher(coarse=True)), freeze_at)
        self._shapes = {
            module: ShapeSpec(channels=infos[module]["num_chs"], stride=infos[module]["reduction"]) for module in names
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every output."""
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride: what is cut into patches would lose the pixels of half a patch."""
        return max(shape.stride for shape in self._shapes.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> outputs (N, C, h, w) by name."""
        return dict(zip(self._shapes, self.body(x), strict=True))


def build_timm_backbone(cfg: CfgNode, name: str, out_features: Sequence[str | int]) -> TimmBackbone:
    """Build a model of timm with the options of ``MODEL.TIMM``."""
    return TimmBackbone(
        name,
        out_features=out_features,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        frozen_bn=cfg.MODEL.TIMM.FROZEN_BN,
        **cfg.MODEL.TIMM.OPTIONS,
    )


def _import_timm(name: str) -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ModuleNotFoundError(f"the backbone timm/{name} needs the package timm: pip install timm") from error


def _freeze(model: nn.Module, groups: dict[int, list[str]], freeze_at: int) -> None:
    frozen = {name for group, names in groups.items() for name in names if group < freeze_at}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad = False
