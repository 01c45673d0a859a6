from detectron2.config import LazyCall as L

from deformable_detr.modeling import TimmBackbone

from ..common.base import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = L(TimmBackbone)(name="convnext_tiny", out_features=[8, 16, 32], freeze_at=0, frozen_bn=True)
model.backbone.in_features = [8, 16, 32]
train.init_checkpoint = "https://huggingface.co/timm/convnext_tiny.fb_in1k/resolve/main/model.safetensors"
