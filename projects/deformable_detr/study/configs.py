"""From the table to a LazyConfig that train_net.py takes."""

import json
from typing import Any

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from ..config import find_config_file, load_config
from ..modeling.decoder import DeformableTransformerDecoder
from ..modeling.encoder import DeformableTransformerEncoder
from .parts import bottleneck_resnet, decoder_layer, encoder_layer
from .table import Cell, Size, Table

# Of the iterations at the full learning rate; the rest has a tenth of it.
_DROP = 0.8


def build_config(table: Table, size_name: str, cell: Cell) -> DictConfig:
    """Return the configuration of a cell, but for its output folder and its data."""
    variant, size = table.variants[cell.variant], table.sizes[size_name]
    settings = {
        **table.settings(size_name, cell.variant),
        **_image_sizes(size),
        "optimizer.lr": size.lr * variant.lr_factor,
        "train.max_iter": size.iterations,
        "train.eval_period": size.eval_period,
        "train.checkpointer.period": size.eval_period,
        "lr_multiplier.scheduler.milestones": [round(_DROP * size.iterations), size.iterations],
        "train.device": size.device,
        "train.seed": cell.seed,
    }
    cfg = load_config(
        find_config_file(variant.model, suffix=".py"),
        [f"{key}={json.dumps(value)}" for key, value in settings.items()],
    )
    _replace_backbone(cfg.model.backbone, size)
    sizes = {"d_model", "n_heads", "dim_feedforward", "dropout"}
    common = {name: cfg.model.transformer[name] for name in sizes} | {"n_levels": cfg.model.backbone.num_feature_levels}
    if variant.encoder:
        _replace_encoder(cfg.model.transformer, {**common, **variant.encoder})
    if variant.decoder:
        _replace_decoder(cfg.model.transformer, {**common, **variant.decoder})
    return cfg


def _image_sizes(size: Size) -> dict[str, Any]:
    """Images are trained and evaluated on as large as they are drawn."""
    shortest, longest = size.scene.short_side, max(size.scene.long_sides)
    train, test = (f"dataloader.{split}.mapper.augmentations" for split in ("train", "test"))
    return {
        f"{train}.min_size": [shortest],
        f"{train}.max_size": longest,
        f"{test}.min_size": shortest,
        f"{test}.max_size": longest,
    }


def _replace_backbone(backbone: DictConfig, size: Size) -> None:
    """Put the size's ResNet in place of ResNet-50, in the middle of a dilation too."""
    dilated = "resnet" in backbone.bottom_up
    node = backbone.bottom_up.resnet if dilated else backbone.bottom_up
    resnet = L(bottleneck_resnet)(**size.backbone, out_features=list(node.out_features))
    if dilated:
        backbone.bottom_up.resnet = resnet
    else:
        backbone.bottom_up = resnet
    if backbone.num_feature_levels > 1:
        backbone.num_feature_levels = size.levels


def _replace_encoder(transformer: DictConfig, layer: dict[str, Any]) -> None:
    transformer.encoder = L(DeformableTransformerEncoder)(
        layer=L(encoder_layer)(**layer, n_points=transformer.enc_n_points),
        num_layers=transformer.num_encoder_layers,
    )


def _replace_decoder(transformer: DictConfig, layer: dict[str, Any]) -> None:
    transformer.decoder = L(DeformableTransformerDecoder)(
        layer=L(decoder_layer)(**layer, n_points=transformer.dec_n_points),
        num_layers=transformer.num_decoder_layers,
        with_box_refine=transformer.with_box_refine,
    )
