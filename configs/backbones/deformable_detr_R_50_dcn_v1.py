from detectron2.config import LazyCall as L

from deformable_detr.modeling import deformable_stages

from ..common.base import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages = L(deformable_stages)(depth=50, modulated=False, stride_in_1x1=False, norm="FrozenBN")
