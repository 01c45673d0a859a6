from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from ..common.base import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = L(FPN)(
    bottom_up=model.backbone.bottom_up,
    in_features=["res3", "res4", "res5"],
    out_channels=256,
    top_block=L(LastLevelMaxPool)(),
)
# The coarsest is half of the one before it, without parameters.
model.backbone.in_features = [8, 16, 32, 64]
