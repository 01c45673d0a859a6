from detectron2.config import LazyCall as L

from deformable_detr.modeling import dilate_res5

from .detr_R_101 import dataloader, lr_multiplier, model, optimizer, train

# The official dilation, which leaves the first block of res5 undilated.
model.backbone.bottom_up = L(dilate_res5)(resnet=model.backbone.bottom_up)
